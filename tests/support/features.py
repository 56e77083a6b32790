"""The ways of generating in docs/support.md: each runs on any cache, and says what it generated.

A feature is run four times: with transformers' own cache, with policy ``exact``, with ``int8``, and once more with
transformers' own cache led along what ``int8`` generated (``lead``), which gives the logits that ``int8`` should have
had.  ``outcomes.py`` compares them.
"""

import copy
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from stand_ins import with_attention
from support.architectures import ARCHITECTURES, IMAGE_TOKEN, Architecture
from transformers import (
    Cache,
    CompileConfig,
    DynamicCache,
    EncoderDecoderCache,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)

from kvquant_hf import QuantizedPagedCache
from kvquant_hf.errors import KVQuantFallbackWarning
from kvquant_hf.transformers_api.names import cache_in, with_cache

PAGE = 8
NEW = 14  # tokens per call: prompts of 21 seal two pages, these seal two more
RETURN = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}


@cache
def model_of(name: str, assistant: bool = False) -> PreTrainedModel:
    """The tiny model of an architecture; ``assistant``: nearly the same, so that it is right now and then."""
    model = ARCHITECTURES[name].build()
    if assistant:
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.data += 0.03 * torch.randn(parameter.shape, generator=generator)
        model.generation_config.num_assistant_tokens = 3
        model.generation_config.num_assistant_tokens_schedule = "constant"
    return model


class Lead(LogitsProcessor):
    """Makes greedy decoding follow ``sequences`` ``[batch, tokens]``."""

    def __init__(self, sequences: torch.Tensor) -> None:
        self.sequences = sequences

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        wanted = self.sequences[:, input_ids.shape[1]].unsqueeze(1)
        return torch.full_like(scores, float("-inf")).scatter(1, wanted, 0.0)


@dataclass
class Turn:
    """One call of ``generate``: its output, and the arguments of the call that would generate it from the start."""

    sequences: torch.Tensor  # [batch, tokens]
    logits: torch.Tensor | None  # [steps, batch, vocabulary]; None for beams
    scores: torch.Tensor | None  # of whole sequences, beams only
    inputs: dict[str, torch.Tensor]


@dataclass
class Runner:
    """Runs features of one architecture on caches of one policy.

    Args:
        architecture: whose model.
        policy: of the paged cache; None for transformers' own.
        implementation: attention implementation; default: the one that transformers picks for the model.
    """

    architecture: Architecture
    policy: str | None
    implementation: str | None = None
    caches: list[QuantizedPagedCache] = field(default_factory=list)
    operators: Counter[str] = field(default_factory=Counter)  # in compiled graphs

    def __post_init__(self) -> None:
        self.model, default = model_of(self.architecture.name), model_of(self.architecture.name, assistant=True)
        self.implementation = self.implementation or default.config._attn_implementation
        if self.implementation != self.model.config._attn_implementation:
            with_attention(self.model, self.implementation)

    def cache(self) -> Cache:
        """An empty cache; of an encoder-decoder, the self-attention's is paged."""
        config = self.model.config
        own = (
            DynamicCache(config=config)
            if self.policy is None
            else QuantizedPagedCache(config, self.policy, page_size=PAGE)
        )
        if isinstance(own, QuantizedPagedCache):
            self.caches.append(own)
        if not config.is_encoder_decoder:
            return own
        return EncoderDecoderCache(own, DynamicCache(config=config.get_text_config(decoder=True)))

    def watch(self, cache: Cache) -> Cache:
        """Have a copy of a cache reported on, too."""
        own = getattr(cache, "self_attention_cache", cache)
        if isinstance(own, QuantizedPagedCache):
            self.caches.append(own)
        return cache

    def generate(self, inputs: dict[str, torch.Tensor], cache: Cache | None = None, **options: Any) -> Turn:
        """``model.generate`` with a fresh cache or ``cache``; greedy unless ``options`` say otherwise."""
        torch.manual_seed(5)
        options = {"max_new_tokens": NEW, "do_sample": False} | options
        cache = self.cache() if cache is None else cache
        given = {} if cache is NAMED else with_cache(cache)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", KVQuantFallbackWarning)
            # Not `model.generate`: Whisper's own cuts its output to pieces; see `greedy`.
            output = GenerationMixin.generate(self.model, **inputs, **given, **options, **RETURN)
        if not given:
            self.watch(cache_in(output))
        beams = options.get("num_beams", 1) > 1
        return Turn(
            output.sequences,
            None if beams else torch.stack(tuple(output.logits)),
            output.sequences_scores if beams else None,
            expand(inputs, output.sequences.shape[0]),
        )

    def lead(self, turn: Turn) -> torch.Tensor:
        """Logits ``[steps, batch, vocabulary]`` along what ``turn`` generated, in one go from its inputs."""
        start = turn.inputs[self.architecture.prompt_name].shape[1]
        options = {"logits_processor": LogitsProcessorList([Lead(turn.sequences)])}
        led = self.generate(turn.inputs, max_new_tokens=turn.sequences.shape[1] - start, **options)
        assert torch.equal(led.sequences, turn.sequences) and led.logits is not None
        return led.logits

    def go_on(self, turn: Turn, cache: Cache, seed: int) -> Turn:
        """A second turn: everything so far, five new tokens, and the cache that holds all but the end."""
        name = self.architecture.prompt_name
        generator = torch.Generator().manual_seed(seed)
        more = torch.randint(3, 90, (turn.sequences.shape[0], 5), generator=generator)
        ids = torch.cat([turn.sequences, more], 1)
        inputs = turn.inputs | {name: ids, self.architecture.mask_name: torch.ones_like(ids)}
        # An image is in the cache already.
        second = self.generate({k: v for k, v in inputs.items() if k != "pixel_values"}, cache)
        second.inputs = inputs
        return second


def expand(inputs: dict[str, torch.Tensor], batch: int) -> dict[str, torch.Tensor]:
    """Inputs whose rows are repeated until there are ``batch``."""
    return {name: x.repeat_interleave(batch // x.shape[0], 0) for name, x in inputs.items()}


# -- the features ------------------------------------------------------------------------------------------------------


def greedy(run: Runner) -> list[Turn]:
    inputs = run.architecture.inputs(batch=2)
    turns = [run.generate(inputs)]
    if run.architecture.kind == "speech":  # Whisper's own `generate`, which writes the decoder's prompt itself
        features = {"input_features": inputs["input_features"]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", KVQuantFallbackWarning)
            tokens = run.model.generate(**features, **with_cache(run.cache()), max_new_tokens=2 * NEW)
        turns.append(Turn(tokens, None, None, {}))
    return turns


def padded(run: Runner) -> list[Turn]:
    return [run.generate(run.architecture.inputs(ragged=True))]


def beams(run: Runner) -> list[Turn]:
    return [run.generate(run.architecture.inputs(batch=2), num_beams=3, num_return_sequences=2)]


def sampling(run: Runner) -> list[Turn]:
    return [run.generate(run.architecture.inputs(ragged=True), do_sample=True, top_k=0, num_return_sequences=2)]


def prompt_lookup(run: Runner) -> list[Turn]:
    """The prompt has every token once, so that whatever comes next is found in it."""
    row = run.architecture
    inputs = row.inputs()
    name = row.prompt_name
    every = 3 + torch.randperm(IMAGE_TOKEN - 3, generator=torch.Generator().manual_seed(2)).unsqueeze(0)
    inputs[name] = torch.cat([inputs[name][:, :1], every, inputs[name][:, -6:]], 1)
    inputs[row.mask_name] = torch.ones_like(inputs[name])
    return [run.generate(inputs, prompt_lookup_num_tokens=3)]


def assisted(run: Runner) -> list[Turn]:
    return [run.generate(run.architecture.inputs(), assistant_model=model_of(run.architecture.name, assistant=True))]


def chunked(run: Runner) -> list[Turn]:
    return [run.generate(run.architecture.inputs(batch=2), prefill_chunk_size=6)]


def multi_turn(run: Runner) -> list[Turn]:
    cache = run.cache()
    first = run.generate(run.architecture.inputs(batch=2), cache)
    return [first, run.go_on(first, cache, seed=1)]


def fork(run: Runner) -> list[Turn]:
    cache = run.cache()
    first = run.generate(run.architecture.inputs(), cache)
    twin = run.watch(copy.deepcopy(cache))
    return [run.go_on(first, each, seed) for seed, each in enumerate((cache, twin, cache)[:2], start=1)]


def save_and_load(run: Runner) -> list[Turn]:
    cache = run.cache()
    first = run.generate(run.architecture.inputs(), cache)
    own = getattr(cache, "self_attention_cache", cache)
    if isinstance(own, QuantizedPagedCache):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache.safetensors"
            own.save(path)
            loaded = QuantizedPagedCache.load(path, run.model.config)
        if own is cache:
            cache = run.watch(loaded)
        else:
            cache.self_attention_cache = run.watch(loaded)
    return [run.go_on(first, cache, seed=1)]


def compiled(run: Runner) -> list[Turn]:
    """Twice with a new cache: the second call must find the graph of the first."""
    asked = [run.architecture.inputs(ragged=True, seed=seed) for seed in range(2)]
    if run.policy is None:
        return [run.generate(inputs) for inputs in asked]
    with compiling(run.model) as (options, operators):
        options["cache_implementation"] = "kvquant"
        options["cache_config"] = {"policy": run.policy, "page_size": PAGE, "static": True}
        turns = [run.generate(inputs, NAMED, **options) for inputs in asked]
    run.operators.update(operators)
    return turns


NAMED = Cache(layers=[])  # stands for the cache that ``generate`` makes by itself


@contextmanager
def compiling(model: PreTrainedModel) -> Iterator[tuple[dict[str, Any], Counter[str]]]:
    """Have ``generate`` compile decode steps as it does on a GPU, with fixed shapes and in one graph.

    Yields:
        Options of ``generate``; and a counter of the package's operators in the graphs, in which ``"graphs"`` counts
        the graphs.
    """
    operators: Counter[str] = Counter()

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        operators.update(name.split(".")[1] for name in names if name.startswith("kvquant_hf."))
        operators["graphs"] += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    config = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=None)
    config._compile_all_devices = True
    torch.compiler.reset()
    try:
        yield {"compile_config": config}, operators
    finally:
        for name in ("_compiled_call", "_last_compile_config", "_previous_max_cache_length"):
            vars(model).pop(name, None)
        torch.compiler.reset()


@dataclass(frozen=True)
class Feature:
    """One column of the table: its name, the function, and one clause on what is run."""

    name: str
    run: Callable[[Runner], list[Turn]]
    summary: str


FEATURES: dict[str, Feature] = {
    feature.name: feature
    for feature in (
        Feature("greedy", greedy, "two prompts of 21 tokens"),
        Feature("left-padded", padded, "prompts of 21, 13 and 2 tokens in one batch"),
        Feature("beams", beams, "`num_beams=3`, two sequences back"),
        Feature("sampling", sampling, "`do_sample`, `num_return_sequences=2`, left-padded"),
        Feature("prompt lookup", prompt_lookup, "`prompt_lookup_num_tokens=3`, a prompt that has every token"),
        Feature("assisted", assisted, "`assistant_model`: the same model with noise on its weights"),
        Feature("chunked prefill", chunked, "`prefill_chunk_size=6`"),
        Feature("multi-turn", multi_turn, "a second `generate` with the same cache and a longer prompt"),
        Feature("fork", fork, "`copy.deepcopy(cache)`, two different continuations"),
        Feature("save and load", save_and_load, "`cache.save`, `QuantizedPagedCache.load`, a continuation"),
        Feature(
            "compile",
            compiled,
            "`static=True`, left-padded; `generate` compiles decode steps (aot_eager), one graph for two calls",
        ),
    )
}
