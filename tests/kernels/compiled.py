"""The product's launchers on CPU tensors, compiled by Triton and run by the PTX machine.

What is here runs in a process that does not interpret (``compiler_process.py``); the tests that call it are those of
``test_compiled.py``.  Inputs and budgets are those of the interpreter's tests, ``test_decode.py`` and
``test_append.py``; this module tells the machine what nobody may read, and checks that inputs stay as they are.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from kernels import test_append, test_decode, test_latent
from kernels.ptx_machine import Launch, Machine, running_on
from latents import make_latents

from kvquant_hf.triton_kernels import chunk
from kvquant_hf.triton_kernels.append import append
from kvquant_hf.triton_kernels.codecs import Codec
from kvquant_hf.triton_kernels.latent_triton import latent_attention_triton
from kvquant_hf.triton_kernels.launch import override_launch
from kvquant_hf.triton_kernels.pages import PagedSide
from kvquant_hf.triton_kernels.reference import paged_attention_reference
from kvquant_hf.triton_kernels.triton_attention import paged_attention_triton

CPU = torch.device("cpu")
Pair = tuple[str, str]


def _pages(codec: Codec, planes: Sequence[torch.Tensor], head_dim: int) -> list[torch.Tensor]:
    """The planes that have a row for each page."""
    return [tensor for plane, tensor in zip(codec.planes(head_dim), planes, strict=True) if plane.per != "layer"]


def inside_larger(x: torch.Tensor, before: Sequence[int], behind: Sequence[int]) -> torch.Tensor:
    """``x`` as a part of a larger tensor, poisoned around it: so many elements more in each dimension."""
    around = test_append.poisoned(tuple(b + n + e for b, n, e in zip(before, x.shape, behind, strict=True)), x.dtype)
    part = around[tuple(slice(b, b + n) for b, n in zip(before, x.shape, strict=True))]
    return part.copy_(x)


@contextlib.contextmanager
def unchanged(*tensors: torch.Tensor | None) -> Iterator[None]:
    """The block leaves the bytes of ``tensors`` as they are."""
    given = [tensor for tensor in tensors if tensor is not None]
    before = [tensor.contiguous().clone().view(torch.uint8) for tensor in given]
    yield
    for i, (old, tensor) in enumerate(zip(before, given, strict=True)):
        assert torch.equal(old, tensor.contiguous().view(torch.uint8)), f"input {i} has changed"


def attend_on(machine: Machine, arch: int, layout: str = "") -> Callable[..., torch.Tensor]:
    """``paged_attention_triton`` on ``machine``.

    ``layout``: "fused" for queries, open pages, tables and masks as parts of larger tensors at even places, "odd" at
    odd ones, "" as they come.
    """

    def attend(
        query: Any, keys: PagedSide, values: PagedSide, table: Any, lengths: Any, **options: Any
    ) -> torch.Tensor:
        mask = options.get("mask")
        if layout:
            more = 8 if layout == "fused" else 3
            by_token = inside_larger(
                query.transpose(1, 2), (0, 0, 0, 0), (0, 1, more, 0)
            )  # [batch, queries, heads, dim]
            if layout == "odd":
                flat = inside_larger(by_token.flatten(2), (0, 0, 1), (0, 0, 2))
                by_token = flat.unflatten(2, by_token.shape[2:])
            query = by_token.transpose(1, 2)
            keys, values = (
                side._replace(tail=inside_larger(side.tail, (0, 1, 0, 0), (0, 1, 2, 2 * more)))
                for side in (keys, values)
            )
            table = inside_larger(table, (0, 0), (0, 3))
            if mask is not None:
                mask = options["mask"] = inside_larger(mask, (0, 0, 0, 1), (0, 0, 0, 4))
        page, window = keys.page_size, options.get("window", 0)
        read = set()
        for b, (sealed, held) in enumerate(lengths.tolist()):
            first = max(sealed * page + held - query.shape[2] - window + 1, 0) // page if window else 0
            read |= set(table[b, first:sealed].tolist())
            for side in (keys, values):
                machine.forbid(side.tail[b, :, held:])
        for side in (keys, values):
            for plane in _pages(side.codec, side.planes, side.head_dim):
                for index in set(range(plane.shape[0])) - read:
                    machine.forbid(plane[index])
        if keys.first is not None and keys.first_at is not None and values.first is not None:
            for b, at in enumerate(keys.first_at.tolist()):
                some = min(keys.first.shape[2], page - at % page) if at >= 0 else 0
                machine.forbid(keys.first[b, :, some:])
                machine.forbid(values.first[b, :, some:])
        first = (keys.first, values.first, keys.first_at)
        inputs = (*first, query, *keys.planes, *values.planes, keys.tail, values.tail, table, lengths, mask)
        with unchanged(*inputs), running_on(machine, arch):
            out = paged_attention_triton(query, keys, values, table, lengths, **options)
        assert not out.isnan().any()
        return out

    return attend


def check_latents(policy: str, case: Any, dtype: torch.dtype, arch: int, **options: Any) -> list[Launch]:
    """Attention over latents within the budget of ``test_latent.py``, and nothing found; what was launched."""
    machine = Machine()

    def attend(
        query: Any, latents: PagedSide, rotary: PagedSide, table: Any, lengths: Any, **options: Any
    ) -> torch.Tensor:
        for side in (latents, rotary):
            for b, held in enumerate(lengths[:, 1].tolist()):
                machine.forbid(side.tail[b, :, held:])
            for plane in _pages(side.codec, side.planes, side.head_dim):
                for index in set(range(plane.shape[0])) - set(table.flatten().tolist()):
                    machine.forbid(plane[index])
        inputs = (query, *latents.planes, *rotary.planes, latents.tail, rotary.tail, table, lengths)
        with unchanged(*inputs), running_on(machine, arch):
            return latent_attention_triton(query, latents, rotary, table, lengths, **options)

    test_latent.check(make_latents(policy, case, dtype), CPU, 2, attend, **options)
    machine.check()
    return machine.launches


def append_on(machine: Machine, arch: int) -> Callable[..., None]:
    """``append`` on ``machine``."""

    def launch(
        keys: Any, values: Any, k: Codec, v: Codec, k_planes: Any, v_planes: Any, k_tail: Any, v_tail: Any,
        table: Any, lengths: Any, new_lengths: Any,
    ) -> None:  # fmt: skip
        machine.forbid(new_lengths)
        for codec, planes, tail in ((k, k_planes, k_tail), (v, v_planes, v_tail)):
            for plane in _pages(codec, planes, tail.shape[3]):
                machine.forbid(plane)
            for b, held in enumerate(lengths[:, 1].tolist()):
                machine.forbid(tail[b, :, held:])
        with unchanged(keys, values, table, lengths), running_on(machine, arch):
            append(keys, values, k, v, k_planes, v_planes, k_tail, v_tail, table, lengths, new_lengths)

    return launch


def check_attention(pair: Pair, case: test_decode.Case, arch: int, layout: str = "") -> list[Launch]:
    """Within the budget, and nothing found; what was launched."""
    machine = Machine()
    test_decode.check(pair, case, CPU, attend_on(machine, arch, layout))
    machine.check()
    return machine.launches


def check_blocks(pair: Pair, case: test_decode.Case, arch: int) -> int:
    """The same with one page of one sequence multiplied out at a time, and MANY_QUERIES queries; how often."""
    sizes = chunk.DENSE_BYTES, chunk.STATE_BYTES
    chunk.DENSE_BYTES = chunk.STATE_BYTES = 1
    try:
        launches = check_attention(pair, case, arch)
    finally:
        chunk.DENSE_BYTES, chunk.STATE_BYTES = sizes
    return sum(launch.name == "_chunk_kernel" for launch in launches)


def append_and_compare(
    machine: Machine,
    pair: Pair,
    tokens: int,
    held: tuple[int, ...],
    dims: tuple[int, int],
    dtype: torch.dtype,
    arch: int,
    page: int = 64,
) -> None:
    """Append so many ``tokens`` to sequences with ``held`` tokens in their open pages: as the reference does."""
    torch.manual_seed(0)
    codecs, pages = test_append.named(pair), len(held) + 1 + tokens // page
    state = test_append.cache(codecs, held, dims, dtype, page=page, pages=pages)
    new = (test_append.gaussian(len(held), 2, tokens, dim, dtype) for dim in dims)
    test_append.compare(state, *new, CPU, launch=append_on(machine, arch))


def check_append(*call: Any) -> list[Launch]:
    """Equal to the reference's bytes, and nothing found; what was launched.  ``call`` as of ``append_and_compare``."""
    machine = Machine()
    append_and_compare(machine, *call)
    machine.check()
    return machine.launches


def check_hard_pages(pair: Pair, dtype: torch.dtype, arch: int) -> None:
    """Pages that break naive formulae."""
    torch.manual_seed(0)
    machine = Machine()
    pages = torch.stack(list(test_append.hard_pages(80, dtype).values()))[None].to(dtype)  # one head per page
    new = torch.cat([pages, pages[:, :, :1]], dim=2)
    state = test_append.cache(test_append.named(pair), (0,), (80, 80), dtype, heads=pages.shape[1])
    launch = append_on(machine, arch)
    test_append.compare(state, new, new, CPU, magnitude=float(pages.float().abs().max()), launch=launch)
    machine.check()


def check_empty(pair: Pair, dtype: torch.dtype, arch: int) -> None:
    """A sequence without tokens and one whose mask hides all give zeros, and the third what it gives alone."""
    torch.manual_seed(0)
    machine = Machine()
    case = test_decode.Case(tokens=(129, 129, 129), dtype=dtype)
    keys, values = (test_decode.side(name, case, 64, 3, CPU) for name in pair)
    for side in (keys, values):
        side.tail[0] = float("nan")
    lengths = torch.tensor([[0, 0], [2, 1], [2, 1]], dtype=torch.int32)
    table = torch.tensor([[2, 2], [0, 1], [1, 0]], dtype=torch.int32)
    query = torch.randn(3, 8, 1, 64).to(dtype)
    mask = torch.ones(3, 1, 1, 192, dtype=torch.bool)
    mask[1] = False
    with override_launch(splits=2):
        out = attend_on(machine, arch)(query, keys, values, table, lengths, scale=0.125, mask=mask)
    machine.check()
    assert not out[:2].any()
    expected = paged_attention_reference(query.float(), keys, values, table, lengths, scale=0.125, mask=mask)[2]
    assert (out[2] - expected).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()
