"""The attention kernels against float64, for every policy's codec pair and the shapes that hurt.

The budget: at most twice the error that eager attention makes in the model's dtype on the same dequantized keys and
values, plus a rounding band.  Kernels round the scaled query and the scaled probabilities to fp16 (eager rounds the
dequantized keys and the probabilities instead), which is one more unit in the last place of each product:

    band = eps * (|scores|_max + 1) * size      eps: of the dtype that enters the product

``size`` is the largest value, or for rotated values twice the length of the longest: a rotation spreads the rounding of
a vector's largest element over all of them, for the codes and for the offset that they are counted from.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from calibrated import with_range

from kvquant_hf.triton_kernels.codecs import CODECS, Codec
from kvquant_hf.triton_kernels.launch import override_launch
from kvquant_hf.triton_kernels.pages import PagedSide
from kvquant_hf.triton_kernels.reference import gather_dense
from kvquant_hf.triton_kernels.triton_attention import paged_attention_triton

PAIRS = (
    ("exact", "exact"),
    ("int8-channel", "int8-affine"),
    ("int4-channel", "int4-hadamard"),
    ("lloyd4-centred", "lloyd2"),
    ("lloyd3-channel", "lloyd3"),
    ("int4-channel", "octet2"),
    ("int4-ranked", "int4-hadamard"),
    ("int3-ranked", "octet3"),
    ("int2-ranked", "octet2"),
    ("int8-token", "int8-token"),
    ("int4-token", "int4-token"),
    ("lloyd3-sign", "lloyd2-plain"),
    ("fp8", "fp8"),
    ("nvfp4", "nvfp4"),
)
PAGE = 64


class Case(NamedTuple):
    """``tokens``: per sequence, the last page is open; lazily sealed, so it holds 1 to PAGE of them.

    ``mask``: "none", "bool" (of keys), "causal" (bool, on top of the causal rule), "float", "heads", or "rows".
    ``rows``: rows of a program instead of the launch table's, if not 0.
    ``first``: how many tokens are read as they came, and where each sequence's begin (negative: it has none).
    ``gain``: powers of two that queries and keys are multiplied by, and the scale divided by both.
    """

    tokens: tuple[int, ...] = (200, 200)
    key_dim: int = 64
    value_dim: int = 64
    group: int = 4
    queries: int = 1
    dtype: torch.dtype = torch.float16
    mask: str = "none"
    softcap: float | None = None
    sinks: bool = False
    window: int = 0
    splits: int = 3
    rows: int = 0
    heads: int = 2
    first: tuple[int, tuple[int, ...]] = (0, ())
    gain: tuple[float, float] = (1.0, 1.0)

    @property
    def causal(self) -> bool:
        return self.mask in ("none", "causal") or self.window > 0

    def __str__(self) -> str:
        dims = (
            f"H{self.heads}" * (self.heads != 2)
            + f"D{self.key_dim}"
            + (f"v{self.value_dim}" if self.value_dim != self.key_dim else "")
        )
        extra = [self.mask] * (self.mask != "none") + ["softcap"] * (self.softcap is not None) + ["sinks"] * self.sinks
        extra += [f"R{self.rows}"] * (self.rows > 0)
        extra += ["large"] * (self.gain != (1.0, 1.0))
        extra += [f"F{self.first[0]}at" + "_".join(map(str, self.first[1]))] * (self.first[0] > 0)
        extra += [f"W{self.window}"] * (self.window > 0) + [f"S{self.splits}"] * (self.splits != 3)
        tokens = "_".join(map(str, dict.fromkeys(self.tokens)))
        dtype = str(self.dtype).removeprefix("torch.")
        return "-".join([dims, f"G{self.group}", f"Q{self.queries}", f"T{tokens}", dtype, *extra])


FLOAT32 = torch.float32
COMMON = (
    Case(tokens=(1, 1)),
    Case(tokens=(PAGE, PAGE), queries=3),
    Case(tokens=(PAGE + 1, PAGE - 1), dtype=FLOAT32),
    Case(tokens=(1000, 130), key_dim=128, value_dim=128, mask="bool", dtype=FLOAT32),
    # One program for the interpreter instead of three.
    Case((200, 70), key_dim=80, value_dim=96, group=7, queries=5, mask="bool", softcap=20.0, sinks=True, rows=64),
    Case(tokens=(300, 300), key_dim=128, value_dim=64, group=1, queries=70, splits=1),
)
FEATURES = (
    Case(tokens=(200, 70), mask="float", dtype=FLOAT32),
    Case(tokens=(200, 70), mask="heads", queries=4, dtype=FLOAT32),
    Case(tokens=(333, 257), window=100, queries=16, dtype=FLOAT32, rows=64),
    Case(tokens=(333, 257), sinks=True, splits=6, dtype=FLOAT32),
    Case(tokens=(130, 130), key_dim=256, value_dim=256, group=16, splits=2),
    Case(tokens=(200, 200), key_dim=192, value_dim=128, group=2, queries=33),
    Case(tokens=(200, 66), mask="rows", queries=4, dtype=FLOAT32),
)


def side(name: str, case: Case, dim: int, pages: int, device: torch.device, gain: float = 1.0) -> PagedSide:
    """Random pages times ``gain``; slots that nobody may read hold NaN."""
    heads, codec = case.heads, with_range(CODECS[name], case.heads, dim, reach=4.0)
    codec = codec.given(*(parameter.to(device) for parameter in codec.parameters))
    vectors = (torch.randn(pages, heads, PAGE, dim, device=device) * gain).to(case.dtype)
    planes = [plane.clone(memory_format=torch.contiguous_format) for plane in codec.encode(vectors)]  # poisoned below
    for plane in planes:
        plane[-1] = float("nan") if plane.dtype.is_floating_point else 0xAB
    tail = torch.full((len(case.tokens), heads, PAGE, dim), float("nan"), dtype=case.dtype, device=device)
    for batch, tokens in enumerate(case.tokens):
        held = (tokens - 1) % PAGE + 1
        tail[batch, :, :held] = (torch.randn(heads, held, dim, device=device) * gain).to(case.dtype)
    pages_of = PagedSide(codec, planes, tail, PAGE)
    if not case.first[0]:
        return pages_of
    count, at = case.first
    first = torch.full((len(at), heads, count, dim), float("nan"), dtype=case.dtype, device=device)
    for batch, begin in enumerate(at):
        if begin >= 0:
            some = min(count, PAGE - begin % PAGE)
            first[batch, :, :some] = (torch.randn(heads, some, dim, device=device) * gain).to(case.dtype)
    return pages_of._replace(first=first, first_at=torch.tensor(at, dtype=torch.int32, device=device))


def masks(case: Case, query_heads: int, device: torch.device) -> torch.Tensor | None:
    longest = max(case.tokens)
    if case.mask == "none":
        return None
    if case.mask == "float":
        return torch.randn(2, 1, case.queries, longest, device=device)
    shape = (2, query_heads if case.mask == "heads" else 1, case.queries, longest)
    mask = torch.rand(shape, device=device) > 0.3
    if case.mask == "rows":
        mask[0, :, 1] = False  # a query that sees nothing
    return mask


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: Case, mask: torch.Tensor | None, sinks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eager attention of one sequence in the dtype of ``q``, and the scores; ``k``, ``v`` ``[heads, tokens, dim]``."""
    tokens, group = k.shape[1], q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = q @ k.transpose(-1, -2) * k.shape[-1] ** -0.5
    if case.softcap is not None:
        scores = torch.tanh(scores / case.softcap) * case.softcap
    raw = scores
    position = torch.arange(case.queries, device=q.device).unsqueeze(1) + tokens - case.queries
    token = torch.arange(tokens, device=q.device)
    if case.causal:
        scores = scores.masked_fill(token > position, float("-inf"))
    if case.window:
        scores = scores.masked_fill(token <= position - case.window, float("-inf"))
    if mask is not None:
        part = mask[..., :tokens]
        scores = scores.masked_fill(~part, float("-inf")) if part.dtype == torch.bool else scores + part.to(q.dtype)
    if sinks is not None:
        column = sinks.to(q.dtype).view(-1, 1, 1).expand(-1, case.queries, 1)
        scores = torch.cat([scores, column], -1)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)[..., :tokens]
    return weights @ v, raw


# In the usual run: all cases with these, two with and without padded dimensions with the others.
WHOLE = (("int8-channel", "int8-affine"), ("int4-channel", "int4-hadamard"))
BRIEF = (COMMON[2], COMMON[4])
RARER = (("lloyd3-channel", "lloyd3"), ("int4-channel", "octet2"))
RANKED = (("int4-ranked", "int4-hadamard"), ("int3-ranked", "octet3"), ("int2-ranked", "octet2"))


def marks(pair: tuple[str, str], repeats: bool = False) -> list[pytest.MarkDecorator]:
    return [pytest.mark.full] * (pair in RARER or pair in RANKED or (repeats and pair not in WHOLE))


pairs = pytest.mark.parametrize("pair", [pytest.param(pair, id="/".join(pair), marks=marks(pair)) for pair in PAIRS])


@pytest.mark.parametrize(
    ("pair", "case"),
    [
        pytest.param(pair, case, id=f"{case}-{'/'.join(pair)}", marks=marks(pair, case not in BRIEF))
        for case in COMMON
        for pair in PAIRS
    ],
)
def test_every_pair(pair: tuple[str, str], case: Case, device: torch.device) -> None:
    check(pair, case, device)


@pytest.mark.parametrize("case", (COMMON[2], Case((130, 66), 80, 96, 2, 2, FLOAT32)), ids=str)
@pytest.mark.parametrize("pair", RARER, ids="/".join)
def test_codes_in_two_planes(pair: tuple[str, str], case: Case, device: torch.device) -> None:
    """Of 3 bits, also where head_dim is padded; every case is in the full run."""
    check(pair, case, device)


@pytest.mark.parametrize("pair", RANKED, ids="/".join)
def test_an_order_in_each_page(pair: tuple[str, str], device: torch.device) -> None:
    """Padded words, and rows that do not fill a block; the full run has more."""
    check(pair, Case((130, 66), 80, 64, 2, 3, heads=1), device)


@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_every_feature(case: Case, device: torch.device) -> None:
    check(("int4-channel", "int4-hadamard"), case, device)


FIRST = (
    Case((200, 70), dtype=FLOAT32, first=(1, (0, -1))),
    Case((200, 70), 80, 96, 2, 3, FLOAT32, "bool", first=(2, (63, 5))),
    Case((130, 140), 64, 64, 1, 2, FLOAT32, "float", softcap=20.0, window=100, first=(40, (64, 100)), heads=1),
    Case((200, 150), 128, 128, group=1, queries=5, first=(2, (3, 63)), heads=1),
)


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_first_tokens(case: Case, device: torch.device) -> None:
    """Read as they came, by their own position: before a page's end, in the open page, and in none of a sequence's."""
    check(("int4-channel", "int4-hadamard"), case, device)


@pytest.mark.parametrize(
    "pair", [WHOLE[1], *(pytest.param(p, marks=pytest.mark.full) for p in PAIRS if p != WHOLE[1])], ids="/".join
)
def test_first_tokens_of_many_queries(pair: tuple[str, str], device: torch.device) -> None:
    """Multiplied out with the pages, rotated like them, for keys and for values."""
    case = Case((200, 131), 80, 64, 2, 66, FLOAT32, "bool", first=(2, (63, 128)), heads=1)
    check(pair, case, device)
    check((pair[0], "exact"), case._replace(first=(2, (129, -1)), dtype=torch.float16), device)


@pytest.mark.parametrize(
    "case", [COMMON[2], Case(tokens=(130, 70), key_dim=80, value_dim=96, group=2), Case(heads=1)], ids=str
)
def test_planes_per_layer(case: Case, device: torch.device) -> None:
    check(("int8-static", "int8-static"), case, device)


@pairs
def test_large_queries_and_keys(pair: tuple[str, str], device: torch.device) -> None:
    """A query times a channel's scale may pass the end of fp16, and infinity times the code 0 is no number."""
    check(pair, Case((130, 70), gain=(256.0, 2048.0)), device)


def in_double(side: PagedSide, held: int) -> PagedSide:
    """Exact tokens in float64, the open page without what is not held."""
    first = None if side.first is None else side.first.double()
    return side._replace(tail=side.tail[:, :, :held].double(), first=first)


def reach(codec: Codec, group: int) -> torch.Tensor:
    """What a calibrated channel is added up from, ``[query_heads, head_dim]``: the lower end of its range and the codes
    counted from there.  Both are rounded, however small their sum is."""
    scale, zero = codec.parameters
    return ((zero - 128 * scale).abs() + 255 * scale).double().repeat_interleave(group, 0)


def check(
    pair: tuple[str, str],
    case: Case,
    device: torch.device,
    attend: Callable[..., torch.Tensor] = paged_attention_triton,
) -> None:
    torch.manual_seed(0)
    heads, batch = case.heads, len(case.tokens)
    query_heads = heads * case.group
    sealed = [(tokens - 1) // PAGE for tokens in case.tokens]
    pages = sum(sealed) + 1  # the last one is nobody's
    keys = side(pair[0], case, case.key_dim, pages, device, case.gain[1])
    values = side(pair[1], case, case.value_dim, pages, device)
    order = torch.randperm(pages - 1, device=device).int()
    table = torch.full((batch, max(sealed)), pages - 1, dtype=torch.int32, device=device)
    table[0, : sealed[0]], table[1, : sealed[1]] = order[: sealed[0]], order[sealed[0] :]
    lengths = torch.tensor(
        [[n, tokens - n * PAGE] for n, tokens in zip(sealed, case.tokens, strict=True)],
        dtype=torch.int32,
        device=device,
    )
    query = (torch.randn(batch, query_heads, case.queries, case.key_dim, device=device) * case.gain[0]).to(case.dtype)
    mask = masks(case, query_heads, device)
    sinks = torch.randn(query_heads, device=device) if case.sinks else None
    read = table.clone()
    if case.window:  # pages that no query sees any more are not read
        for b, tokens in enumerate(case.tokens):
            read[b, : max(tokens - case.queries - case.window + 1, 0) // PAGE] = pages - 1
    with override_launch(splits=case.splits, **({"rows": case.rows} if case.rows else {})):
        out = attend(
            query,
            keys,
            values,
            read,
            lengths,
            scale=case.key_dim**-0.5 / (case.gain[0] * case.gain[1]),
            causal=case.causal,
            mask=mask,
            softcap=case.softcap,
            sinks=sinks,
            window=case.window,
        )
    assert out.shape == (batch, query_heads, case.queries, case.value_dim) and out.dtype == case.dtype
    for b, tokens in enumerate(case.tokens):
        held = tokens - sealed[b] * PAGE
        k, v = (
            gather_dense(in_double(s.of(slice(b, b + 1)), held), table[b : b + 1, : sealed[b]])[0]
            for s in (keys, values)
        )
        part = None if mask is None else mask[b]
        q, k = query[b] / case.gain[0], k / case.gain[1]
        expected, scores = attention(q.double(), k, v, case, part, sinks)
        eager, _ = attention(q, k.to(case.dtype), v.to(case.dtype), case, part, sinks)
        budget = 2 * (eager.double() - expected).abs().max()
        eps = torch.finfo(torch.float16 if case.dtype != torch.float32 else torch.float32).eps
        size = 2 * v.norm(dim=-1).max() if values.codec.rotated else v.abs().max()
        band = eps * (scores.abs().max() + 1) * size
        if keys.codec.parameters:
            logits = (query[b].double().abs() * reach(keys.codec, case.group).unsqueeze(1)).sum(-1) * case.key_dim**-0.5
            band += eps * (2 * logits.max() * v.abs().max() + reach(values.codec, case.group).max())
        error = (out[b].double() - expected).abs().max()
        assert error <= budget + band, f"sequence {b}: error {error:.2e}, budget {budget:.2e} + {band:.2e}"


def test_too_many_rows_for_one_launch() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from kvquant_hf.triton_kernels.plan import attention_plan

    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float16, device="meta")

    pages = PagedSide(CODECS["exact"], (meta(4, 1, PAGE, 128),), meta(1, 1, PAGE, 128), PAGE)
    with pytest.raises(ValueError, match="in chunks"):
        attention_plan(meta(1, 64, 1 << 18, 128), pages, pages, meta(1, 4), None, True, 0, False, None)
