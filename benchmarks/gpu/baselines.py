"""What is measured against: attention over bf16 keys and values, by everything that is installed and runs.

A decode step can be put to a kernel in two ways: the query heads of a group beside each other (``enable_gqa``), or the
heads of a group as queries of one head (``grouped``; without a causal mask the two are the same sum).  The second reads
every key once for its whole group whatever the kernel does about groups, so it is what a careful user would run.
"""

import importlib
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Call = Callable[[], torch.Tensor]

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
_FLASH = {"flash-attn-2": "flash_attn", "flash-attn-3": "flash_attn_interface"}


class UnavailableError(RuntimeError):
    """A contender that cannot run here; the message says why."""


def _sdpa(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> Call:
    def call() -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, **options)

    return call


def _flash(module: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
    """FlashAttention's own entry for decoding, which splits long caches; it takes ``[batch, tokens, heads, dim]``."""
    if importlib.util.find_spec(module) is None:
        raise UnavailableError(f"{module} is not installed")
    attention = importlib.import_module(module).flash_attn_with_kvcache
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return lambda: attention(q, k, v, causal=True)


def _flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def decode_contenders(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, free: int, flex: bool
) -> dict[str, Callable[[], Call]]:
    """Makers of the bf16 contenders of a decode step, by name; a maker, or its call, raises where it cannot run.

    Args:
        q: ``[batch, query_heads, 1, head_dim]``.
        k, v: ``[batch, kv_heads, tokens, head_dim]``.
        free: bytes that are free; the plain formula is left out where its copy for every query head does not fit.
        flex: whether to compile FlexAttention for these shapes.
    """
    group = q.shape[1] // k.shape[1]
    grouped = q.view(q.shape[0], k.shape[1], group, q.shape[3])
    makers: dict[str, Callable[[], Call]] = {}
    for name, backend in _BACKENDS.items():
        if name == "math":
            # Scores and weights in float32 beside keys and values repeated for every head of a group.
            needed = 2 * group * (k.nbytes + v.nbytes)
            makers["sdpa-math"] = _refuse_if(
                needed > free,
                f"needs {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are left",
                lambda backend=backend: _sdpa(backend, q, k, v, enable_gqa=True),
            )
            continue
        makers[f"sdpa-{name}"] = lambda backend=backend: _sdpa(backend, q, k, v, enable_gqa=True)
        makers[f"sdpa-{name}-grouped"] = lambda backend=backend: _sdpa(backend, grouped, k, v)
    makers["flex"] = _refuse_if(
        not flex, "compiles for every shape; measured at the anchor batch only", lambda: _flex(q, k, v)
    )
    for name, module in _FLASH.items():
        makers[name] = lambda module=module: _flash(module, q, k, v)
    return makers


def chunk_contenders(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Callable[[], Call]]:
    """The same for a chunk of queries at the end of the keys: causal, aligned at the last token."""
    from torch.nn.attention.bias import causal_lower_right

    causal = causal_lower_right(q.shape[2], k.shape[2])
    makers: dict[str, Callable[[], Call]] = {}
    for name in ("flash", "efficient"):
        backend = _BACKENDS[name]
        makers[f"sdpa-{name}"] = lambda backend=backend: _sdpa(backend, q, k, v, attn_mask=causal, enable_gqa=True)
    group = q.shape[1] // k.shape[1]
    # What transformers does where a backend knows no groups: copy keys and values for every query head.
    makers["sdpa-flash-repeated"] = lambda: (
        lambda: _sdpa(
            SDPBackend.FLASH_ATTENTION,
            q,
            k.repeat_interleave(group, 1),
            v.repeat_interleave(group, 1),
            attn_mask=causal,
        )()
    )
    for name, module in _FLASH.items():
        makers[name] = lambda module=module: _flash(module, q, k, v)
    return makers


def _refuse_if(refused: bool, reason: str, maker: Callable[[], Call]) -> Callable[[], Call]:
    def refuse() -> Call:
        raise UnavailableError(reason)

    return refuse if refused else maker
