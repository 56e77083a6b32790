"""The door for latents (MLA): attention of a layer's queries over the latents and rotary keys in pages.

The queries go through the layer's weight for keys once, what they gather through its weight for values once, and what
is held is never multiplied by either (``latent_reference.py`` has the formulae): a step of one token multiplies one
token, where the model's own arithmetic multiplies all that are held.  From ``expands_from`` queries on, plain torch
makes keys and values of a block of pages at a time: then a score of ``nope + rope`` elements instead of ``rank +
rope`` saves more than that costs.  Not where Triton runs, whose products are those of tensor cores.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import library

from .choice import Implementation, choose
from .codecs import CODECS
from .cpu.attention import latent_attention_cpu
from .latent_reference import ExpandedLatents, Latents
from .latent_triton import latent_attention_triton
from .pages import PagedSide
from .reference import attend_by
from .target import current


def latent_attention_reference(
    query: torch.Tensor,
    latents: PagedSide,
    rotary: PagedSide,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """What kernels do too: absorbed queries ``[batch, query_heads, queries, rank + rope]`` over latents and rotary
    keys, of one head each; returns ``[batch, query_heads, queries, rank]``.  The rest as ``ops.paged_attention``."""
    return attend_by(Latents, query, (latents, rotary), page_table, lengths, **options)


_ATTEND: dict[str, Callable[..., torch.Tensor]] = {
    "triton": latent_attention_triton,
    "cpu": latent_attention_cpu,
    "reference": latent_attention_reference,
}


def expands_from(rank: int, expanded: int) -> int:
    """Queries from which on expanding costs less: of a token and head it takes ``rank * expanded`` products, and saves
    ``2 * rank - expanded`` for each query.

    Args:
        rank: elements of a latent.
        expanded: elements that a head makes of it, ``nope + value``.
    """
    saved = 2 * rank - expanded
    return -(-rank * expanded // saved) if saved > 0 else 1


class LatentChoice(NamedTuple):
    """What runs, as ``Choice``, and whether keys and values are made of a block of pages at a time."""

    name: Implementation
    reason: str = ""
    expands: bool = False


def choose_for_latents(
    impl: str, query: torch.Tensor, latents: PagedSide, rotary: PagedSide, expanded: int
) -> LatentChoice:
    """What ``impl`` means for a call of ``latent_attention``.

    Args:
        impl: as of ``choose``; only ``"auto"`` may expand.
        query: the queries.
        latents, rotary: the pages.
        expanded: ``nope + value``.

    Raises:
        ImplementationError: as ``choose``.
    """
    choice = choose(impl, query.dtype, latents, rotary, latent=True)
    if impl == "auto" and choice.name != "triton" and query.shape[2] >= expands_from(latents.head_dim, expanded):
        return LatentChoice("reference", choice.reason, expands=True)
    return LatentChoice(*choice)


def _run(
    query: torch.Tensor,
    weight: torch.Tensor,
    latents: PagedSide,
    rotary: PagedSide,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    options: dict[str, Any],
    choice: LatentChoice,
) -> torch.Tensor:
    if choice.expands:
        return attend_by(partial(ExpandedLatents, weight), query, (latents, rotary), page_table, lengths, **options)
    nope = query.shape[3] - rotary.head_dim
    weight, (batch, heads, queries, _) = weight.to(query.dtype), query.shape

    def rows(x: torch.Tensor) -> torch.Tensor:
        """``[heads, batch * queries, n]``: the weight of a head is not copied for each sequence."""
        return x.transpose(0, 1).reshape(heads, batch * queries, x.shape[3])

    asked = torch.bmm(rows(query[..., :nope]), weight[:, :nope]).unflatten(1, (batch, queries)).transpose(0, 1)
    absorbed = torch.cat((asked, query[..., nope:]), -1)
    gathered = _ATTEND[choice.name](absorbed, latents, rotary, page_table, lengths, **options)
    # The weight first: transposed it would be copied, which on a CPU takes longer than the product.
    values = torch.bmm(weight[:, nope:], rows(gathered).transpose(1, 2))  # [heads, value, batch * queries]
    return values.unflatten(2, (batch, queries)).permute(2, 0, 3, 1)


def _attend(
    query: torch.Tensor,
    weight: torch.Tensor,
    latent_codec: str,
    latent_planes: list[torch.Tensor],
    latent_tail: torch.Tensor,
    rotary_codec: str,
    rotary_planes: list[torch.Tensor],
    rotary_tail: torch.Tensor,
    latent_first: torch.Tensor | None,
    rotary_first: torch.Tensor | None,
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
    page_size = latent_tail.shape[2]
    latents = PagedSide(CODECS[latent_codec], latent_planes, latent_tail, page_size, latent_first, first_at)
    rotary = PagedSide(CODECS[rotary_codec], rotary_planes, rotary_tail, page_size, rotary_first, first_at)
    options = {"scale": scale, "causal": causal, "mask": mask, "softcap": softcap, "sinks": sinks, "window": window}
    choice = choose_for_latents(impl, query, latents, rotary, weight.shape[1])
    return _run(query, weight, latents, rotary, page_table, lengths, options, choice).contiguous()


_attention_op = library.custom_op("kvquant_hf::latent_attention", _attend, mutates_args=())


@_attention_op.register_fake
def _(query: torch.Tensor, weight: torch.Tensor, *args: Any) -> torch.Tensor:
    rope = args[5].shape[3]
    return query.new_empty(*query.shape[:3], weight.shape[1] - query.shape[3] + rope)


def latent_attention(
    query: torch.Tensor,
    weight: torch.Tensor,
    latents: PagedSide,
    rotary: PagedSide,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    causal: bool = True,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    window: int = 0,
    impl: Implementation | LatentChoice = "auto",
) -> torch.Tensor:
    """Softmax attention of the queries of all heads over latents and rotary keys in pages.

    Args:
        query: ``[batch, query_heads, queries, nope + rope]``.
        weight: ``[query_heads, nope + value, rank]``, what each head makes of a latent: first of its key, then its
            value; a floating dtype, used in the queries'.
        latents: packed and open latents, ``[batch, 1, tokens, rank]``.
        rotary: packed and open rotary keys, ``[batch, 1, tokens, rope]``, as many tokens.
        impl: what is to run, or what ``choose_for_latents`` said of this call.

    The other arguments are those of ``ops.paged_attention``.

    Returns:
        ``[batch, query_heads, queries, value]`` in the query's dtype.  A row that sees no token is zero.

    Raises:
        ImplementationError: ``impl`` names kernels that cannot run here.
    """
    if torch.compiler.is_compiling():
        name = impl if isinstance(impl, str) else impl.name
        k, v = latents, rotary
        pages = (k.codec.name, list(k.planes), k.tail, v.codec.name, list(v.planes), v.tail)
        first = (k.first, v.first, k.first_at)
        options = (scale, causal, mask, softcap, sinks, window)
        return _attention_op(query, weight, *pages, *first, page_table, lengths, *options, name)
    if isinstance(impl, str):
        impl = choose_for_latents(impl, query, latents, rotary, weight.shape[1])
    named = {"scale": scale, "causal": causal, "mask": mask, "softcap": softcap, "sinks": sinks, "window": window}
    with current(query):
        return _run(query, weight, latents, rotary, page_table, lengths, named, impl)
