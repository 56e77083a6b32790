"""Many queries: pages multiplied out block by block, queries some at a time, and what that takes in memory.

The budget is that of ``test_decode.py``; the chunks of ``test_long_chunks.py`` go the same way, in one block.
"""

import itertools
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from kernels.test_decode import FLOAT32, PAGE, Case, check, marks

from kvquant_hf.triton_kernels import chunk, launching
from kvquant_hf.triton_kernels.codecs import CODECS
from kvquant_hf.triton_kernels.dense_pages import PackedPages

MIB = 1 << 20
# Values rotated, keys rotated, neither, planes of bits, and channels in the order of each page.
KINDS = (
    ("int4-channel", "int4-hadamard"),
    ("lloyd4-centred", "lloyd2"),
    ("exact", "exact"),
    ("lloyd3-channel", "lloyd3"),
    ("int2-ranked", "int4-hadamard"),
)
CASES = (
    Case((330, 190), 64, 64, 2, 130, heads=1),
    Case((260, 150), 80, 96, 1, 70, FLOAT32, window=100, sinks=True, heads=1),
    Case((200, 100), 64, 64, 2, 66, mask="rows", softcap=20.0, heads=1),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pair", "case"),
    [
        pytest.param(pair, case, id=f"{case}-{'/'.join(pair)}", marks=marks(pair, case is not CASES[0]))
        for pair in KINDS
        for case in CASES
    ],
)
@pytest.mark.parametrize("pages", [1, 2])
def test_blocks_and_queries_in_turn(
    pair: tuple[str, str], case: Case, pages: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every block goes on where the last one ended, and every part of the queries begins anew."""
    blocks = []
    dense = chunk.dense_pages
    one = len(case.tokens) * case.heads * PAGE * (case.key_dim + case.value_dim) * case.dtype.itemsize
    monkeypatch.setattr(chunk, "DENSE_BYTES", pages * one)
    monkeypatch.setattr(chunk, "STATE_BYTES", 1)
    monkeypatch.setattr(
        chunk, "dense_pages", lambda *a, **k: (blocks.append((k["first_page"], k["queries"])), dense(*a, **k))
    )
    check(pair, case, device)
    in_turn = itertools.product(range(0, case.queries, 64), range(0, (max(case.tokens) - 1) // PAGE + 1, pages))
    expected = [(page, case.queries - 1 - begin) for begin, page in in_turn]
    assert [(page, first) for page, (first, _) in blocks] == expected and len(blocks) > 2


def packed(batch: int, heads: int, dim: int, pages: int, pair: tuple[str, str], dtype: torch.dtype) -> PackedPages:
    """Pages without memory."""
    keys, values = (CODECS[name] for name in pair)
    assert keys.kernel is not None and values.kernel is not None
    tail = torch.empty(batch, heads, PAGE, dim, dtype=dtype, device="meta")
    table = torch.empty(batch, pages, dtype=torch.int32, device="meta")
    return PackedPages(keys.kernel, values.kernel, [], [], tail, tail, keys.rotated, values.rotated, table, table)


@pytest.mark.parametrize("pair", KINDS, ids="/".join)
@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT32], ids=str)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 131072), (8, 32768), (8, 8192), (1, 8192)])
def test_memory_of_a_chunk(
    pair: tuple[str, str], dtype: torch.dtype, batch: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8,192 queries of 32 heads, 8 key/value heads x 128: under 256 MiB beside the result, whatever the history."""
    shape = (batch, 32, 8192, 128)
    pages = packed(batch, 8, 128, tokens // PAGE, pair, dtype)
    query, out = torch.empty(2, *shape, dtype=dtype, device="meta")
    taken = allocations(monkeypatch)
    chunk.chunk_attention(out, query, pages, None, None, scale=1.0, causal=True, window=0, softcap=None)
    assert 0 < sum(taken) <= chunk.DENSE_BYTES + chunk.STATE_BYTES < 256 * MIB
    fits = chunk.sizes(shape, dtype, pages)
    assert fits.queries % 64 == 0 and (fits.queries >= 512 or not fits.kept), "few queries would unpack pages too often"


def allocations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each tensor that the launcher makes from now on, while kernels are not launched."""
    taken = []

    def counted(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate(*args: object, **options: object) -> torch.Tensor:
            tensor = function(*args, **options)
            taken.append(tensor.nbytes)
            return tensor

        return allocate

    monkeypatch.setattr(torch.Tensor, "new_empty", counted(torch.Tensor.new_empty))
    monkeypatch.setattr(launching, "launch", lambda *args, **options: None)
    return taken
