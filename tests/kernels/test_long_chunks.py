"""Chunks of many queries over a stored history: prefill in pieces, with ragged lengths, masks, windows and splits.

The budget is that of ``test_decode.py``.  The interpreter takes as long for a program whatever its rows, so most cases
have larger row blocks than a GPU would get, and one key/value head.
"""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from kernels.test_decode import FLOAT32, PAGE, Case, check, pairs

from kvquant_hf.triton_kernels.decode import _seen_pages
from kvquant_hf.triton_kernels.target import tl, triton

CASES = (
    Case((450, 257), 96, 96, 3, 257, FLOAT32, heads=1, rows=256, splits=1),
    Case((331, 130), 128, 128, 3, 130, mask="causal", heads=1, rows=128),
    Case((600, 260), 96, 128, 3, 130, window=100, heads=1, rows=128, splits=1),
    Case((600, 320), 64, 64, 1, 257, FLOAT32, window=128, mask="causal", heads=1, rows=64),
    Case((193, 140), 64, 64, 1, 130, heads=1, splits=1),  # the launch table's own rows
)
# How many queries see what: everything before them, also through a mask, or a window.
KINDS = ({}, {"mask": "causal"}, {"window": 100}, {"window": 100, "mask": "causal"})
MATRIX = tuple(
    Case((queries + 200, queries), dim, dim, 7, queries, heads=1, rows=128, **fields)
    for queries, dim in itertools.product((130, 257), (128, 96))
    for fields in (
        {"splits": splits, "dtype": dtype, **kind}
        for splits in (1, 3)
        for dtype in (torch.float16, FLOAT32)
        for kind in KINDS
    )
)


@pytest.mark.slow
@pairs
def test_every_pair(pair: tuple[str, str], device: torch.device) -> None:
    case = Case((331, 130), 128, 128, 1, 130, heads=1, rows=64)
    check(pair, case, device)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_kind(case: Case, device: torch.device) -> None:
    check(("int8-channel", "int8-affine"), case, device)


@pytest.mark.full
@pairs
@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_in_full(pair: tuple[str, str], case: Case, device: torch.device) -> None:
    check(pair, case, device)


@triton.jit
def _seen_kernel(
    out_ptr,
    queries,
    sealed,
    tail,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    PAGE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
):
    first, end = _seen_pages(tl.program_id(0), queries, sealed, tail, GROUP, ROWS, PAGE, CAUSAL, WINDOW)
    tl.store(out_ptr + tl.program_id(0) * 2, first)
    tl.store(out_ptr + tl.program_id(0) * 2 + 1, end)


@pytest.mark.parametrize("window", [0, 1, 64, 100, 128])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("group", "queries", "rows", "sealed", "tail"),
    [(1, 1, 8, 5, 1), (4, 1, 8, 7, 64), (7, 130, 16, 6, 3), (1, 257, 64, 4, 1), (3, 20, 8, 1, 64), (16, 3, 8, 0, 3)],
)
def test_a_block_reads_the_pages_that_its_rows_see(
    causal: bool, window: int, group: int, queries: int, rows: int, sealed: int, tail: int, device: torch.device
) -> None:
    blocks = -(-group * queries // rows)
    out = torch.zeros(blocks, 2, dtype=torch.int32, device=device)
    _seen_kernel[(blocks,)](out, queries, sealed, tail, group, rows, PAGE, causal, window)
    token = torch.arange(sealed * PAGE)
    for block, (first, end) in enumerate(out.tolist()):
        row = torch.arange(block * rows, min((block + 1) * rows, group * queries))
        position = (sealed * PAGE + tail - queries + row % queries).unsqueeze(1)
        seen = torch.ones(len(row), len(token), dtype=torch.bool)
        if causal:
            seen &= token <= position
        if window:
            seen &= token > position - window
        pages = seen.view(len(row), sealed, PAGE).any(2).any(0).nonzero().flatten().tolist()
        assert set(pages) <= set(range(first, end)), f"block {block} misses pages"
        # A block over two heads may start in the middle of one; otherwise no page too many.
        if first < end and (block * rows) % queries + len(row) <= queries:
            assert pages == list(range(first, end if causal else sealed)), f"block {block} reads too much"
