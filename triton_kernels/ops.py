"""The door: append to pages, attend over pages.  Callers see these functions, not what runs behind them.

Both are registered with torch (as ``torch.ops.kvquant_hf.append_pages`` and ``.paged_attention``), so that
``torch.compile`` takes them whole; eager calls go past the registration, which costs as much as a launch.  Both take
``impl``:

    "triton"     Triton kernels, or an error that says what is missing
    "cpu"        compiled C++ kernels, or an error that says what is missing
    "reference"  plain torch, anywhere
    "auto"       the kernels of the device where they run, else plain torch; ``choose`` says which, and why
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import library

from .append_reference import append_reference, round_reference
from .choice import IMPLEMENTATIONS, Choice, Implementation, choose
from .codecs import CODECS
from .cpu.append import append_cpu, round_cpu
from .cpu.attention import paged_attention_cpu
from .first import put_first
from .pages import PagedSide
from .reference import gather_dense, paged_attention_reference
from .round import round_triton
from .target import current
from .triton_attention import append_triton, paged_attention_triton

__all__ = [
    "IMPLEMENTATIONS",
    "Choice",
    "Implementation",
    "PagedSide",
    "append_pages",
    "choose",
    "dense_attention",
    "gather_dense",
    "paged_attention",
    "put_first",
    "round_keys",
]


_APPEND: dict[str, Callable[..., None]] = {
    "triton": append_triton,
    "cpu": append_cpu,
    "reference": append_reference,
}
_ROUND: dict[str, Callable[..., None]] = {"triton": round_triton, "cpu": round_cpu, "reference": round_reference}
_ATTEND: dict[str, Callable[..., torch.Tensor]] = {
    "triton": paged_attention_triton,
    "cpu": paged_attention_cpu,
    "reference": paged_attention_reference,
}


def _run_append(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_side: PagedSide,
    value_side: PagedSide,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    new_lengths: torch.Tensor,
    impl: str,
) -> None:
    function = _APPEND[choose(impl, keys.dtype, key_side, value_side).name]
    with current(keys):
        function(keys, values, key_side, value_side, page_table, lengths, new_lengths)


def _append(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_codec: str,
    key_planes: list[torch.Tensor],
    key_tail: torch.Tensor,
    value_codec: str,
    value_planes: list[torch.Tensor],
    value_tail: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    new_lengths: torch.Tensor,
    impl: str,
) -> None:
    key_side = PagedSide(CODECS[key_codec], key_planes, key_tail, key_tail.shape[2])
    value_side = PagedSide(CODECS[value_codec], value_planes, value_tail, value_tail.shape[2])
    _run_append(keys, values, key_side, value_side, page_table, lengths, new_lengths, impl)


_WRITTEN = ("key_planes", "key_tail", "value_planes", "value_tail", "new_lengths")
_append_op = library.custom_op("kvquant_hf::append_pages", _append, mutates_args=_WRITTEN)


@_append_op.register_fake
def _(*args: object) -> None:
    return None


def append_pages(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_side: PagedSide,
    value_side: PagedSide,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    new_lengths: torch.Tensor,
    *,
    impl: Implementation = "auto",
) -> None:
    """Store new tokens behind those held: pages that they complete go to the planes, the rest to the open pages.

    The open page is sealed by the first token that does not fit in it.  How many pages each sequence completes is
    decided where ``lengths`` lie, so that a step never waits for the host.

    Args:
        keys, values: new tokens ``[batch, heads, tokens, dim]`` in the model's dtype, any strides.
        key_side, value_side: the pages; planes and open pages are written.
        page_table: int32 ``[batch, pages]``; holds a page of its own for each logical page that may be sealed.
        lengths: int32 ``[batch, 2]``: sealed pages and tokens in the open page of each sequence before this call.
        new_lengths: int32 ``[batch, 2]``, another tensor: the same after this call; written.
        impl: what is to run.

    Raises:
        ImplementationError: ``impl`` names kernels that cannot run here.
    """
    if not torch.compiler.is_compiling():
        return _run_append(keys, values, key_side, value_side, page_table, lengths, new_lengths, impl)
    k, v = key_side, value_side
    pages = (k.codec.name, list(k.planes), k.tail, v.codec.name, list(v.planes), v.tail)
    _append_op(keys, values, *pages, page_table, lengths, new_lengths, impl)
    return None


def round_keys(
    side: PagedSide, x: torch.Tensor, pages: torch.Tensor, metric: torch.Tensor, *, impl: Implementation = "auto"
) -> None:
    """Encode whole pages of keys, sealed before, once more in the metric of queries (``codecs/feedback.py``).

    Args:
        side: keys, of a codec with ``uses_queries``; planes are written.
        x: what the pages hold, ``[batch, heads, count * page_size, head_dim]`` in the model's dtype.
        pages: int64 ``[batch, count]``, where it is to go.
        metric: float32 ``[batch, heads, head_dim, head_dim]``, second moments of the queries of each key/value head,
            up to a factor.
        impl: what is to run.

    Raises:
        ImplementationError: ``impl`` names kernels that cannot run here.
    """
    with current(x):
        _ROUND[choose(impl, x.dtype, side).name](side, x, pages, metric)


def _run_attention(
    query: torch.Tensor,
    keys: PagedSide,
    values: PagedSide,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    causal: bool,
    mask: torch.Tensor | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    window: int,
    impl: str | Choice,
) -> torch.Tensor:
    choice = impl if isinstance(impl, Choice) else choose(impl, query.dtype, keys, values)
    with current(query):
        return _ATTEND[choice.name](
            query,
            keys,
            values,
            page_table,
            lengths,
            scale=scale,
            causal=causal,
            mask=mask,
            softcap=softcap,
            sinks=sinks,
            window=window,
        )


def _attend(
    query: torch.Tensor,
    key_codec: str,
    key_planes: list[torch.Tensor],
    key_tail: torch.Tensor,
    value_codec: str,
    value_planes: list[torch.Tensor],
    value_tail: torch.Tensor,
    key_first: torch.Tensor | None,
    value_first: torch.Tensor | None,
    first_at: torch.Tensor | None,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    causal: bool,
    mask: torch.Tensor | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    window: int,
    impl: str,
) -> torch.Tensor:
    keys = PagedSide(CODECS[key_codec], key_planes, key_tail, key_tail.shape[2], key_first, first_at)
    values = PagedSide(CODECS[value_codec], value_planes, value_tail, value_tail.shape[2], value_first, first_at)
    return _run_attention(query, keys, values, page_table, lengths, scale, causal, mask, softcap, sinks, window, impl)


_attention_op = library.custom_op("kvquant_hf::paged_attention", _attend, mutates_args=())


@_attention_op.register_fake
def _(query: torch.Tensor, *args: object) -> torch.Tensor:
    value_tail = args[5]
    assert isinstance(value_tail, torch.Tensor)
    return query.new_empty(*query.shape[:3], value_tail.shape[3])


def paged_attention(
    query: torch.Tensor,
    keys: PagedSide,
    values: PagedSide,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    causal: bool = True,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    window: int = 0,
    impl: Implementation | Choice = "auto",
) -> torch.Tensor:
    """Softmax attention of ``query`` over sealed pages and the open page.

    Args:
        query: ``[batch, query_heads, queries, key_dim]``; ``query_heads`` is a multiple of the key/value heads (GQA).
        keys: packed and open keys.
        values: packed and open values, as many tokens.
        page_table: int32 ``[batch, pages]``, physical page of each logical page; pages past the sealed ones are unused.
        lengths: int32 ``[batch, 2]``: sealed pages and tokens in the open page of each sequence.
        scale: multiplies the scores before the softmax.
        causal: query i sees the keys up to ``tokens - queries + i`` (bottom-right alignment).
        mask: ``[batch or 1, query_heads or 1, queries or 1, tokens or more]``; bool (True is seen) or added to the
            scores.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        sinks: ``[query_heads]``, a logit per head that takes part in the softmax and carries no value.
        window: a query sees the last ``window`` positions up to its own; 0 for all.
        impl: what is to run, or what ``choose`` said of these pages.

    Returns:
        ``[batch, query_heads, queries, value_dim]`` in the query's dtype.  A row that sees no token is zero.

    Raises:
        ImplementationError: ``impl`` names kernels that cannot run here.
    """
    options = (scale, causal, mask, softcap, sinks, window)
    if not torch.compiler.is_compiling():
        return _run_attention(query, keys, values, page_table, lengths, *options, impl)
    if isinstance(impl, Choice):
        impl = impl.name
    k, v = keys, values
    pages = (k.codec.name, list(k.planes), k.tail, v.codec.name, list(v.planes), v.tail)
    first = (k.first, v.first, k.first_at)
    return _attention_op(query, *pages, *first, page_table, lengths, *options, impl)


def dense_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    causal: bool = True,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """``paged_attention`` where nothing is packed: ``keys`` ``[batch, heads, tokens, key_dim]``, ``values`` alike."""
    key_side, value_side = (PagedSide(CODECS["exact"], (), x, x.shape[2]) for x in (keys, values))
    batch, tokens = keys.shape[0], keys.shape[2]
    lengths = torch.tensor([[0, tokens]] * batch, dtype=torch.int32)
    page_table = torch.empty(batch, 0, dtype=torch.int32, device=query.device)
    options: dict[str, Any] = {"scale": scale, "causal": causal, "mask": mask, "softcap": softcap, "sinks": sinks}
    return paged_attention_reference(query, key_side, value_side, page_table, lengths, **options)
