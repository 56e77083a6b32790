"""What one call of attention has in common with all calls like it, made once and kept.

AttentionKernels   by codecs, dtypes, dims, page size, kind of mask: kernels with their constants, and how many
                   programs of the first a multiprocessor holds, which is known when it is compiled
AttentionPlan      by the shapes of a call as well: grids and splits
"""

import dataclasses
import functools
from collections.abc import Hashable
from typing import Any

import torch

from .codecs import Codec, likeness
from .combine import MANY_ROWS, _combine_kernel, _combine_rows_kernel, combine_constants
from .decode import TABLE_UNIT, _decode_kernel, decode_constants
from .launch import LaunchConfig, launch_config, overridden, split_count
from .launching import Launcher
from .occupancy import multiprocessor, residents
from .pages import PagedSide
from .target import architecture, compiled_for, has_ptx, processors


class AttentionKernels:
    """The kernels of one kind of call on one device, and the layout of what the first leaves for the second.

    Args:
        codecs: of keys and of values.
        dtype: of the queries; ``device``: where they are.
        page_size: tokens of a page; ``dims``: head_dim of keys and of values.
        first: tokens of each sequence that are read as they came.
        group: query heads per key/value head.
        many: whether there are many rows to combine.
        config: how the first is launched.
        causal, window, softcap: as constants of ``decode``.
        mask: 0 for none, 1 for a bool mask, 2 for one that is added; ``shared_mask`` whether all rows have one row.
        sinks: whether there are any.
    """

    def __init__(
        self,
        codecs: tuple[Codec, Codec],
        dtype: torch.dtype,
        device: torch.device,
        page_size: int,
        first: int,
        dims: tuple[int, int],
        group: int,
        many: bool,
        config: LaunchConfig,
        causal: bool,
        window: int,
        softcap: bool,
        mask: int,
        shared_mask: bool,
        sinks: bool,
    ) -> None:
        keys, values = codecs[0].kernel, codecs[1].kernel
        assert keys is not None and values is not None, "choose() lets no other codec through"
        self.keys, self.values, self.config, self.device = keys, values, config, device
        self.rotated = codecs[0].rotated
        ptx = has_ptx(device)
        self.columns = max(16, 1 << (dims[1] - 1).bit_length())
        # Bytes of a program's table of its queries.
        self.table = dims[0] * config.rows * dtype.itemsize if keys.order is not None else 0
        self.decode = Launcher(
            _decode_kernel,
            decode_constants(
                keys,
                values,
                dtype,
                ptx,
                dims,
                page_size,
                group,
                self.columns,
                config,
                first=first,
                causal=causal,
                window=window,
                softcap=softcap,
                mask=mask,
                shared_mask=shared_mask,
            ),
        )
        self.combine = Launcher(
            _combine_rows_kernel if many else _combine_kernel,
            combine_constants(codecs[1].rotated, ptx, dims[1], self.columns, group, sinks, many),
        )
        self._residents = 0

    def residents(self, args: tuple[Any, ...]) -> int:
        """Programs of ``decode`` that a multiprocessor holds, where it is called with ``args``: at most those of the
        launch table, and what shared memory and registers leave.  Compiles it."""
        if not self._residents:
            self._residents = self.config.residents
            limits = multiprocessor(architecture(self.device), self.device)
            if limits is not None and (compiled := self.decode.compile(*args)) is not None:
                if self.device.type == "cuda":
                    compiled.run  # noqa: B018  # loads it, and only then its registers are known
                registers = getattr(compiled, "n_regs", None) or 255
                held = residents(limits, compiled.metadata.shared, self.config.warps, registers)
                self._residents = min(self._residents, held)
        return self._residents


class AttentionPlan:
    """One shape of call.

    Args:
        kernels: what runs.
        query: shape of the queries.
        heads: heads of the keys and values; ``value_dim`` head_dim of the values.
        many: whether there are many rows to combine.
        pages: pages of the longest sequence that a query may see.
    """

    def __init__(
        self, kernels: AttentionKernels, query: torch.Size, heads: int, value_dim: int, many: bool, pages: int
    ) -> None:
        self.kernels, self.pages = kernels, pages
        batch, query_heads, queries, key_dim = query
        rows = query_heads // heads * queries
        self.counts = (heads, queries)
        self.programs = batch * heads * -(-rows // kernels.config.rows)
        self.combine_grid = (batch * heads * (-(-rows // MANY_ROWS) if many else rows), 1, 1)
        self.out = torch.Size((batch, query_heads, queries, value_dim))
        self.out_strides = (query_heads * queries * value_dim, queries * value_dim, value_dim)
        self.rotated_strides = (query_heads * queries * key_dim, queries * key_dim, key_dim)
        self._rows = (batch, heads, rows)
        # Not known before ``settle``: splits, and float32 numbers of scratch memory.  That is accumulators, [batch,
        # heads, splits + 1, rows, columns], of each split and the open page, and from ``state_at`` on maximum (base 2)
        # and sum of each, [batch, heads, splits + 1, rows, 2]; then, from a multiple of TABLE_UNIT on where keys have
        # orders of their own, a table of queries for each program, [splits, programs, channels, rows].
        self.splits = self.scratch = self.state_at = 0

    def settle(self, args: tuple[Any, ...]) -> None:
        """Choose the splits, for calls of ``decode`` with arguments like ``args``."""
        config, device = self.kernels.config, self.kernels.device
        if not {"splits", "residents"} & dict(overridden()).keys():
            config = dataclasses.replace(config, residents=self.kernels.residents(args))
        splits = split_count(config, self.programs, self.pages, processors(device))
        batch, heads, rows = self._rows
        results = batch * heads * (splits + 1) * rows
        self.state_at, self.scratch = results * self.kernels.columns, results * (self.kernels.columns + 2)
        if self.kernels.table:
            tables = -(-self.scratch // TABLE_UNIT.value) * TABLE_UNIT.value
            self.scratch = tables + splits * self.programs * self.kernels.table // 4
        self.splits = splits


def attention_plan(
    query: torch.Tensor,
    keys: PagedSide,
    values: PagedSide,
    page_table: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    window: int,
    softcap: bool,
    sinks: torch.Tensor | None,
) -> AttentionPlan:
    """The plan of a call; arguments as of ``ops.paged_attention``, ``softcap`` whether there is one.

    Raises:
        ValueError: the rows of one head have 2^31 accumulated numbers or more, which 32-bit offsets do not reach.
    """
    tail = values.tail
    return _attention_plan(
        (likeness(keys.codec), likeness(values.codec)),
        query.shape,
        query.dtype,
        keys.tail.dtype,
        tail.shape,
        tail.dtype,
        0 if keys.first is None else keys.first.shape[2],
        page_table.shape[1],
        query.device,
        compiled_for(query),
        None if mask is None else (mask.dtype, mask.shape[1] == 1 or mask.stride(1) == 0),
        causal,
        window,
        softcap,
        None if sinks is None else sinks.dtype,
        overridden(),
    )


@functools.lru_cache(maxsize=2048)
def _attention_plan(
    codecs: tuple[Codec, Codec],
    query: torch.Size,
    dtype: torch.dtype,
    key_dtype: torch.dtype,
    tail: torch.Size,
    value_dtype: torch.dtype,
    first: int,
    pages: int,
    device: torch.device,
    where: Hashable,
    mask: tuple[torch.dtype, bool] | None,
    causal: bool,
    window: int,
    softcap: bool,
    sinks: torch.dtype | None,
    overrides: Hashable,
) -> AttentionPlan:
    _, query_heads, queries, key_dim = query
    heads, page_size, value_dim = tail[1:]
    group = query_heads // heads
    rows, dims = group * queries, (key_dim, value_dim)
    planes = sum(codec.kernel.code_planes for codec in codecs if codec.kernel is not None)
    bits = sum(codec.bits for codec in codecs)
    config = launch_config(architecture(device), dtype.itemsize, page_size * max(dims), rows, bits, planes)
    if mask is not None:
        config = config.masked()
    if any(codec.kernel is not None and codec.kernel.order is not None for codec in codecs):
        config = config.ordered(architecture(device))
    many = rows >= 4 * MANY_ROWS
    kind = 0 if mask is None else 1 if mask[0] == torch.bool else 2
    kernels = _attention_kernels(
        codecs,
        dtype,
        device,
        page_size,
        first,
        dims,
        group,
        many,
        config,
        causal and queries > 1,
        window,
        softcap,
        kind,
        mask is not None and mask[1] and queries == 1,
        sinks is not None,
        # What a launcher has to know apart: dtypes of its tensors, and what it is compiled for.
        unlike=(key_dtype, value_dtype, where, mask and mask[0], sinks),
    )
    if rows * kernels.columns >= 1 << 31:
        raise ValueError(f"{queries} queries for {group} heads are too many for one launch; pass them in chunks")
    if window:
        pages = min(pages, -(-(window + queries - 1) // page_size) + 1)  # more are never seen
    return AttentionPlan(kernels, query, heads, value_dim, many, pages)


@functools.lru_cache(maxsize=512)
def _attention_kernels(*arguments: Any, unlike: Hashable) -> AttentionKernels:
    return AttentionKernels(*arguments)
