"""The door: operators that torch knows, a choice that never falls back when it was explicit, one result behind both."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from calibrated import with_range
from stores import vectors
from torch import library

from kvquant_hf.errors import ImplementationError, KVQuantError
from kvquant_hf.pages.parameters import in_pages, on_every_page
from kvquant_hf.policies.table import POLICIES
from kvquant_hf.triton_kernels import choice
from kvquant_hf.triton_kernels.codecs import CODECS
from kvquant_hf.triton_kernels.hadamard import hadamard
from kvquant_hf.triton_kernels.ops import Implementation, PagedSide, append_pages, choose, paged_attention
from kvquant_hf.triton_kernels.rotate import rotate

PAGE = 16


def side(codec_name: str, pages: int, batch: int, dim: int, dtype: torch.dtype, device: torch.device) -> PagedSide:
    """Empty pages of two heads, full of NaN or 0xAB."""
    codec, planes = with_range(CODECS[codec_name], 2, dim), []
    for plane in in_pages(codec, dim):
        stored = torch.empty(pages, 2, *plane.shape(PAGE), dtype=plane.dtype or dtype, device=device)
        planes.append(stored.fill_(float("nan") if stored.is_floating_point() else 0xAB))
    planes += on_every_page(codec.given(*(parameter.to(device) for parameter in codec.parameters)), pages)
    return PagedSide(codec, planes, torch.full((batch, 2, PAGE, dim), float("nan"), dtype=dtype, device=device), PAGE)


def stored(policy: str, tokens: tuple[int, ...], device: torch.device, impl: str = "reference") -> tuple[Any, ...]:
    """Keys, values, page table and lengths of ``tokens`` per sequence, appended in two calls of different sizes."""
    parsed, batch = POLICIES[policy], len(tokens)
    pages = [(n - 1) // PAGE for n in tokens]
    order = torch.randperm(sum(pages) + 2, device=device).int()
    table = torch.full((batch, max(pages) + 1), int(order[-1]), dtype=torch.int32, device=device)
    sides = [side(name, sum(pages) + 2, batch, 32, torch.float32, device) for name in (parsed.keys, parsed.values)]
    lengths = torch.zeros(batch, 2, dtype=torch.int32, device=device)
    for b, n in enumerate(tokens):
        start = sum(pages[:b])
        table[b, : pages[b]] = order[start : start + pages[b]]
        for first, last in ((0, n // 2), (n // 2, n)):
            if first == last:
                continue
            x = vectors(1, 2, n, 32, seed=b)[:, :, first:last].to(device)
            part = slice(b, b + 1)
            mine = [s._replace(tail=s.tail[part]) for s in sides]
            after = torch.full_like(lengths[part], -9)
            append_pages(x, 2 * x, *mine, table[part], lengths[part], after, impl=impl)
            lengths[part] = after
    return (*sides, table, lengths)


@pytest.mark.parametrize("policy", list(POLICIES))
def test_both_implementations_agree(policy: str, device: torch.device) -> None:
    """Appended and attended to by either, in all four combinations, ragged lengths and reserved pages included."""
    query = vectors(2, 6, 3, 32, seed=5).to(device)
    results = {}
    for writer in ("reference", "triton"):
        problem = stored(policy, (3 * PAGE + 5, PAGE), device, writer)
        assert problem[3].tolist() == [[3, 5], [0, PAGE]]
        for reader in ("reference", "triton"):
            results[writer, reader] = paged_attention(query, *problem, scale=32**-0.5, impl=reader)
    expected = results.pop(("reference", "reference"))
    for pair, result in results.items():
        # Another order of sums, and a code on the edge between two may differ after the rotation.
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()), msg=str(pair))


@pytest.mark.parametrize("window", [5, 40, *(pytest.param(n, marks=pytest.mark.full) for n in (1, 16, 1000))])
def test_window_is_a_mask(window: int, device: torch.device) -> None:
    tokens, queries = 3 * PAGE + 5, 7
    problem = stored("int8", (tokens, tokens), device)
    query = vectors(2, 6, queries, 32, seed=5).to(device)
    position = torch.arange(tokens - queries, tokens, device=device).unsqueeze(1)
    token = torch.arange(tokens, device=device)
    mask = ((token <= position) & (token > position - window)).expand(1, 1, -1, -1)
    for impl in ("reference", "triton"):
        windowed = paged_attention(query, *problem, scale=0.2, window=window, impl=impl)
        masked = paged_attention(query, *problem, scale=0.2, causal=False, mask=mask, impl=impl)
        torch.testing.assert_close(windowed, masked, rtol=1e-5, atol=1e-5)


def test_ragged_reference_equals_one_by_one(device: torch.device) -> None:
    tokens = (3 * PAGE + 5, PAGE, 2 * PAGE + 1)
    keys, values, table, lengths = stored("int4", tokens, device)
    query = vectors(3, 6, 2, 32, seed=5).to(device)
    mask = torch.rand(3, 1, 2, max(tokens), device=device) > 0.3
    together = paged_attention(query, keys, values, table, lengths, scale=0.2, mask=mask, impl="reference")
    for b, n in enumerate(tokens):
        part = slice(b, b + 1)
        alone = [s._replace(tail=s.tail[part]) for s in (keys, values)]
        one = paged_attention(
            query[part], *alone, table[part], lengths[part], scale=0.2, mask=mask[part, ..., :n], impl="reference"
        )
        torch.testing.assert_close(together[part], one, rtol=1e-6, atol=1e-6)


def test_nothing_outside_of_the_lengths_is_read(device: torch.device) -> None:
    """Reserved pages, the rest of the open page and what is beyond a mask's use may hold anything."""
    keys, values, table, lengths = stored("turboquant", (2 * PAGE + 3,) * 2, device)
    assert all(s.tail[:, :, 3:].isnan().all() for s in (keys, values))
    query = vectors(2, 6, 1, 32, seed=5).to(device)
    for impl in ("reference", "triton"):
        expected = paged_attention(query, keys, values, table, lengths, scale=0.2, impl=impl)
        assert expected.isfinite().all()
        poisoned = table.clone()
        poisoned[:, 2] = 1 << 30
        assert torch.equal(paged_attention(query, keys, values, poisoned, lengths, scale=0.2, impl=impl), expected)


@pytest.mark.parametrize("impl", ["reference", "triton", "cpu"])
def test_operators_are_what_torch_expects(impl: str, device: torch.device) -> None:
    """Schema, mutated arguments, fake tensors and tracing, as torch's own checker sees them."""
    if impl == "cpu" and device.type != "cpu":
        pytest.skip("the CPU kernels are for the CPU")
    keys, values, table, lengths = stored("int4", (PAGE + 3, 5), device)
    x = vectors(2, 2, PAGE, 32, seed=7).to(device)
    after = torch.zeros_like(lengths)
    table = torch.tensor([[0, 1], [2, 2]], dtype=torch.int32, device=device)
    pages = ("int4-ranked", list(keys.planes), keys.tail, "int4-hadamard", list(values.planes), values.tail)
    checks = ("test_schema", "test_faketensor")
    library.opcheck(torch.ops.kvquant_hf.append_pages, (x, x, *pages, table, lengths, after, impl), test_utils=checks)
    query = vectors(2, 6, 2, 32, seed=5).to(device)
    x, at = x[:, :, :1].contiguous(), torch.tensor([0, -1], dtype=torch.int32, device=device)
    for first in ((None, None, None), (x, x, at)):
        library.opcheck(
            torch.ops.kvquant_hf.paged_attention,
            (query, *pages, *first, table, lengths, 0.2, True, None, None, None, 0, impl),
            test_utils=checks,
        )


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_compiled_without_a_break(impl: Implementation, device: torch.device) -> None:
    """A step made of both operators compiles as one graph, and the graph writes what the step writes."""

    def step(x: torch.Tensor, query: torch.Tensor, cache: tuple[Any, ...], after: torch.Tensor) -> torch.Tensor:
        keys, values, table, lengths = cache
        append_pages(x, x, keys, values, table, lengths, after, impl=impl)
        return paged_attention(query * 2, keys, values, table, after, scale=0.2, impl=impl) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x, query = vectors(2, 2, 1, 32, seed=7).to(device), vectors(2, 6, 1, 32, seed=5).to(device)
    results = []
    for function in (step, compiled):
        torch.manual_seed(0)
        cache = stored("int8", (PAGE, PAGE), device)
        after = torch.zeros_like(cache[3])
        results.append((function(x, query, cache, after), after, *cache[0].planes, cache[0].tail))
    assert results[0][1].tolist() == [[1, 1], [1, 1]]
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(eager, graph, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"page_size": 24}, ["24 tokens", "power of two", "use page_size=64"]),
        ({"page_size": 8}, ["8 tokens", "power of two"]),
        ({"dtype": torch.float64}, ["float64", "cast the model"]),
        ({"head_dims": (512, 64)}, ["512", "smaller page_size"]),
        ({"head_dims": (66, 64)}, ["'int4-channel'", "66"]),
        ({"codec_names": ("int4-ranked", "lloyd2"), "head_dims": (72, 64)}, ["'int4-ranked'", "16 elements", "72"]),
        (
            {"codec_names": ("int4-channel", "int3-ranked")},
            ["'int3-ranked'", "for keys only", "use another one for values"],
        ),
    ],
    ids=str,
)
def test_explicit_choices_never_fall_back(change: dict[str, Any], words: list[str], device: torch.device) -> None:
    codecs = "int4-channel", "int4-hadamard"
    sizes = {"device": device, "dtype": torch.float16, "page_size": 64, "head_dims": (64, 64), "codec_names": codecs}
    sizes["stored"] = torch.float16
    assert choice._choose("triton", **sizes, interpreted=True) == ("triton", "")
    sizes |= change
    with pytest.raises(ImplementationError) as caught:
        choice._choose("triton", **sizes, interpreted=True)
    message = str(caught.value)
    assert all(word in message for word in ["impl='triton'", *words, "impl='auto'"]) and "\n" not in message
    assert isinstance(caught.value, KVQuantError)
    auto = choice._choose("auto", **sizes | {"device": torch.device("cuda")}, interpreted=True)
    assert auto.name == "reference" and words[0] in auto.reason
    assert choice._choose("reference", **sizes, interpreted=True) == ("reference", "")


@pytest.mark.parametrize("gpu", ["sm_75", "gfx942"])
def test_exact_pages_that_a_gpu_has_no_room_for(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not compile there is refused with the page size that does (``test_compile_targets.py``)."""
    monkeypatch.setattr(choice, "why_not", lambda device: None)
    monkeypatch.setattr(choice, "architecture", lambda device: gpu)
    half = torch.float16

    def obstacle(page_size: int, head_dim: int, *names: str) -> str | None:
        codecs = CODECS[names[0]], CODECS[names[1]]
        return choice._obstacle(torch.device("cuda"), half, page_size, (head_dim, head_dim), codecs)

    for page_size, head_dim in ((64, 256), (128, 128)):
        refused = obstacle(page_size, head_dim, "exact", "exact")
        assert refused is not None and f"shared memory of {gpu}; use a smaller page_size" in refused
        assert obstacle(page_size // 2, head_dim, "exact", "exact") is None
        assert obstacle(page_size, head_dim, "int4-channel", "exact") is None
    monkeypatch.setattr(choice, "architecture", lambda device: "sm_70")
    assert obstacle(64, 256, "exact", "exact") is None


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU "auto" is the compiled kernels; "triton" raises unless its interpreter is on."""
    cpu = torch.device("cpu")
    keys, values, *_ = stored("int8", (5,), cpu)
    assert choose("auto", torch.float32, keys, values) == choose("cpu", torch.float32, keys, values) == ("cpu", "")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert choose("auto", torch.float32, keys, values) == ("cpu", "")
    with pytest.raises(ImplementationError, match=r"'cpu'.*GPU.*TRITON_INTERPRET=1"):
        choose("triton", torch.float32, keys, values)
    with pytest.raises(ImplementationError, match="unknown impl 'cuda'; use 'auto', 'triton', 'cpu', 'reference'"):
        choose("cuda", torch.float32, keys, values)


@pytest.mark.parametrize("head_dim", [8, 16, 64, 80, 96, 256])
@pytest.mark.parametrize("layout", [lambda x: x, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)])
def test_rotate(head_dim: int, layout: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> None:
    query = layout(vectors(3, 5, 7, head_dim).to(device))
    expected = hadamard(query.double())
    tolerance = 4 * head_dim * torch.finfo(torch.float32).eps * float(query.abs().max())
    torch.testing.assert_close(rotate(query).double(), expected, rtol=0, atol=tolerance)
