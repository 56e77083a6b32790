"""Models whose weights stay in the blocks of a GGUF file, beside the same file multiplied out by transformers."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import KV_HEADS, save_gguf
from ties import ROUNDING, Margins
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, GgufConfig

from kvquant_hf import QuantizedPagedCache
from kvquant_hf.batching.hooks import unsupported
from kvquant_hf.cli.models import builtin_file
from kvquant_hf.cli.terminal import CommandError
from kvquant_hf.errors import GradientError, KVQuantFallbackWarning, MissingPackageError, UnsupportedModelError
from kvquant_hf.transformers_api.names import with_cache
from kvquant_hf.triton_kernels.blocks import FORMATS
from kvquant_hf.triton_kernels.cpu.build import BuildError
from kvquant_hf.weights import load, load_packed, weight_bytes
from kvquant_hf.weights.modules import PackedEmbedding, PackedLinear
from kvquant_hf.weights.names import halves_order, parameter_name

pytest.importorskip("gguf", reason="gguf is not installed")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def multiplied_out(file: Path) -> Any:
    """The same file as transformers loads it."""
    settings = GgufConfig(dequantize=True)
    options = {"gguf_file": file.name, "quantization_config": settings, "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(file.parent, local_files_only=True, **options).eval()


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
@pytest.mark.parametrize(
    "architecture, tied", [("llama", True), ("llama", False), ("qwen2", True), ("qwen3", False)], ids=str
)
def test_as_multiplied_out(
    architecture: str, tied: bool, compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits are those of the same file with transformers, but for the order of sums; no matrix is kept in floats."""
    file = save_gguf(tmp_path / "model.gguf", architecture, tied=tied)
    if not compiled:

        def no_compiler() -> None:
            raise BuildError("no compiler; install one")

        monkeypatch.setattr(load, "library", no_compiler)
        with pytest.warns(KVQuantFallbackWarning, match="plain torch: no compiler"):
            model = load_packed(file)
    else:
        model = load_packed(file)
    for name, module in model.named_modules():
        assert type(module) is not torch.nn.Embedding
        assert type(module) is not torch.nn.Linear or name.endswith("o_proj")  # the one in F16
        assert not isinstance(module, PackedLinear | PackedEmbedding) or module.compiled == compiled
    reference = multiplied_out(file)
    for tokens in (1, 7, 40):  # as steps and as prompts
        ids = torch.randint(0, 250, (2, tokens))
        found, exact = logits(model, ids), logits(reference, ids)
        assert (found - exact).abs().max() <= ROUNDING * exact.abs().max()
    assert model.generation_config.eos_token_id == reference.generation_config.eos_token_id
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


def test_bytes_are_counted(tiny: Path) -> None:
    """Those of the file, its tensors in F16 and F32 in the model's dtype, and what belongs to no file."""
    import gguf

    for dtype in (torch.float32, torch.bfloat16):
        model = load_packed(tiny, dtype)
        tensors = gguf.GGUFReader(tiny).tensors
        packed = sum(int(t.n_bytes) for t in tensors if t.tensor_type.name in FORMATS)
        plain = sum(int(t.n_elements) for t in tensors if t.tensor_type.name not in FORMATS)
        others = sum(buffer.untyped_storage().nbytes() for buffer in model.buffers())
        assert weight_bytes(model) == packed + plain * dtype.itemsize + others
        assert model.packed_formats == {"Q4_0": 5, "Q5_0": 2, "Q8_0": 2, "F16": 2, "Q5_1": 2, "Q4_1": 2, "F32": 5}
        assert model.dtype == dtype and logits(model, torch.tensor([[1, 2]])).dtype == dtype
    assert weight_bytes(load_packed(tiny)) < weight_bytes(multiplied_out(tiny)) / 2


def test_bytes_of_tensors_made_of_others() -> None:
    """As torchao's weights and those of bitsandbytes are; what is shared counts once."""

    class Made(torch.Tensor):
        @staticmethod
        def __new__(cls: type, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
            made = torch.Tensor._make_wrapper_subclass(cls, (4, 8), dtype=torch.bfloat16)
            made.codes, made.scales = codes, scales
            return made

        def __tensor_flatten__(self) -> tuple[list[str], None]:
            return ["codes", "scales"], None

        @classmethod
        def __torch_dispatch__(cls, *arguments: object) -> None:
            raise AssertionError("counting computes nothing")

    class State:
        def __init__(self, *sizes: int) -> None:
            self.absmax = torch.zeros(sizes[0])
            self.state2 = State(*sizes[1:]) if sizes[1:] else None

    module = torch.nn.Module()
    module.register_buffer("made", Made(torch.zeros(16, dtype=torch.uint8), torch.zeros(4)))
    module.weight = torch.nn.Parameter(torch.zeros(32, dtype=torch.uint8), requires_grad=False)
    module.weight.quant_state = State(10, 3)
    module.same = module.weight
    module.head = torch.nn.Linear(2, 2, bias=False)
    assert weight_bytes(module) == (16 + 16) + 32 + 40 + 12 + 16


@pytest.mark.parametrize("policy", ["exact", "int8", "int4", "turboquant"])
def test_a_quantized_cache(policy: str, tiny: Path) -> None:
    """``exact`` gives DynamicCache's logits; any policy holds the same bytes as with plain weights."""
    ids = torch.randint(0, 250, (2, 150))
    reports, found = [], []
    for model in (load_packed(tiny), multiplied_out(tiny)):
        cache = QuantizedPagedCache(model.config, policy, prefill="quantized")
        with torch.no_grad():
            model(ids[:, :140], **with_cache(cache))
            found.append(torch.cat([model(ids[:, i : i + 1], **with_cache(cache)).logits for i in range(140, 150)], 1))
        reports.append(cache.report())
    assert reports[0].bytes == reports[1].bytes and reports[0].paged_calls == reports[1].paged_calls
    if policy == "exact":
        reference = logits(load_packed(tiny), ids)[:, 140:]
        assert (found[0] - reference).abs().max() <= ROUNDING * reference.abs().max()


def test_generating(tiny: Path) -> None:
    """Greedy tokens are those with plain weights and DynamicCache."""
    ids = torch.randint(0, 250, (1, 70))
    margins = Margins()
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10, "attention_mask": torch.ones_like(ids)}
    exact = multiplied_out(tiny).generate(ids, **with_cache(DynamicCache()), **options, **margins.options)
    margins.check()
    model = load_packed(tiny)
    assert torch.equal(model.generate(ids, **with_cache(QuantizedPagedCache(model.config, "exact")), **options), exact)


@pytest.mark.skipif(bool(unsupported()), reason="this transformers is too old for continuous batching")
def test_batched_continuously(tiny: Path) -> None:
    """Each request's tokens are those that it gets alone."""
    from kvquant_hf import QuantizedBatchingConfig

    model = load_packed(tiny)
    prompts = [torch.randint(0, 250, (length,)).tolist() for length in (70, 33, 9)]
    config = QuantizedBatchingConfig(policy="exact", max_bytes=5_000_000)
    settings = GenerationConfig(do_sample=False, max_new_tokens=6, eos_token_id=-1)
    results = model.generate_batch(prompts, settings, continuous_batching_config=config)
    found = sorted((result.prompt_ids, result.generated_tokens) for result in results.values())
    for prompt, tokens in found:
        margins, ids = Margins(), torch.tensor([prompt])
        alone = model.generate(ids, settings, attention_mask=torch.ones_like(ids), **margins.options)
        margins.check()
        assert alone[0, len(prompt) :].tolist() == tokens
    assert [prompt for prompt, _ in found] == sorted(prompts)


def test_another_dtype_and_copies(tiny: Path) -> None:
    """``to`` changes what is computed in, not the blocks; a copy has blocks of its own."""
    model = load_packed(tiny)
    blocks = model.model.embed_tokens.weight
    other = copy.deepcopy(model).to(torch.bfloat16)
    assert other.model.embed_tokens.weight.dtype == torch.uint8 and torch.equal(other.model.embed_tokens.weight, blocks)
    assert other.model.embed_tokens(torch.tensor([3])).dtype == torch.bfloat16
    assert logits(other, torch.tensor([[1, 2, 3]])).dtype == torch.bfloat16
    assert "Q4_0" in repr(model) and "Q8_0" in repr(model)


def test_gradients_are_refused(tiny: Path) -> None:
    model = load_packed(tiny)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    embedded = model.get_input_embeddings()(torch.tensor([[1, 2]])).requires_grad_()
    with pytest.raises(GradientError, match=r"torch\.no_grad"):
        model(inputs_embeds=embedded)
    with torch.no_grad():
        model(inputs_embeds=embedded)


EXPERTS = {"blk.0.ffn_gate_exps.weight": np.zeros((2, 4), np.float32)}
REFUSED = {
    "architecture": ({"architecture": "phi3"}, "architecture 'phi3'.*llama, qwen2, qwen3 can"),
    "unknown tensor": (EXPERTS, "tensor 'blk.0.ffn_gate_exps.weight' that is not known"),
    "unknown format": ({}, "weights in Q8_0, which cannot stay packed.*Q4_0, Q4_1"),
    "missing": ({"ffn_gate": None}, "no weights for model.layers.0.mlp.gate_proj.weight"),
    "shape": ({"blk.0.attn_q_norm.weight": np.zeros(16, np.float32)}, "no model.layers.0.self_attn.q_norm.weight of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_sentence(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, says = REFUSED[case]
    if case == "unknown format":
        monkeypatch.setattr(load, "FORMATS", {name: known for name, known in FORMATS.items() if name != "Q8_0"})
    file = save_gguf(tmp_path / "model.gguf", **changes)
    with pytest.raises(UnsupportedModelError, match=says) as found:
        load_packed(file)
    assert "\n" not in str(found.value) and str(found.value).endswith("load it with plain weights (--weights full)")


def test_no_file_and_no_package(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"give a \.gguf file"):
        load_packed(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("no such thing, but long enough to be looked at as if it were one")
    with pytest.raises(UnsupportedModelError, match="no GGUF file"):
        load_packed(tmp_path / "text.gguf")
    monkeypatch.setattr(load, "find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(MissingPackageError, match="need gguf; pip install gguf"):
        load_packed(tiny)


def test_names() -> None:
    assert parameter_name("blk.12.attn_q.bias") == "model.layers.12.self_attn.q_proj.bias"
    assert parameter_name("output_norm.weight") == "model.norm.weight"
    for unknown in ("attn_q.weight", "blk.0.output.weight", "blk.0.attn_rot_embd", "rope_freqs.weight", "x"):
        assert parameter_name(unknown) is None
    # Two heads of four: neighbours 0 and 1 are the first of each half.
    assert halves_order(8, KV_HEADS).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.model
def test_a_real_file() -> None:
    """SmolLM2: 97 MB instead of 269 in bfloat16, and it says what it says."""
    try:
        file = builtin_file()
    except CommandError as error:
        pytest.skip(str(error))
    model = load_packed(file, torch.bfloat16)
    assert model.packed_formats == {"Q8_0": 1, "F32": 61, "Q4_1": 210}
    assert 96.4e6 < weight_bytes(model) < 96.6e6
    ids = torch.tensor([[504, 3575, 282, 4649, 314]])  # The capital of France is
    cache = QuantizedPagedCache(model.config, "int4")
    assert model.generate(ids, max_new_tokens=1, do_sample=False, **with_cache(cache))[0, -1] == 7042  # Paris
