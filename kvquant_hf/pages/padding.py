"""Padding costs nothing: no page of its own, and no share in the scale of the page that it is in.

Padded tokens are never attended to, so what is stored for them is free to choose.  In a page with real tokens they are
stored as copies of the first of these, which moves no minimum, maximum or norm.  Pages of padding alone are all one
physical page.
"""

import numpy as np
import torch


def padded_pages(padding: np.ndarray, page_size: int) -> np.ndarray:
    """Which pages hold padding alone.

    Args:
        padding: bool ``[batch, pages * page_size]``, True where a token is padding.
        page_size: tokens per page.

    Returns:
        bool ``[batch, pages]``.
    """
    return np.logical_and.reduce(padding.reshape(len(padding), -1, page_size), axis=-1)


def replace_padding(tokens: torch.Tensor, padding: np.ndarray, page_size: int) -> torch.Tensor:
    """Padding replaced by the first real token of its page; pages without one stay as they are.

    Args:
        tokens: keys or values of whole pages, ``[batch, heads, pages * page_size, head_dim]``.
        padding: bool ``[batch, pages * page_size]``.
        page_size: tokens per page.

    Returns:
        A copy of ``tokens``, contiguous.
    """
    real = ~padding.reshape(len(padding), -1, page_size)
    own = np.arange(real.shape[1] * page_size).reshape(-1, page_size)
    first = own[:, :1] + real.argmax(-1, keepdims=True)  # [batch, pages, 1]
    source = np.where(real | ~real.any(-1, keepdims=True), own, first).reshape(len(padding), -1)
    rows = torch.arange(len(padding), device=tokens.device).unsqueeze(-1)
    return tokens.transpose(1, 2)[rows, torch.from_numpy(source).to(tokens.device)].transpose(1, 2).contiguous()


def replace_new(new: torch.Tensor, tail: torch.Tensor, held: int, padding: np.ndarray, page_size: int) -> torch.Tensor:
    """:func:`replace_padding` over an open page and what follows it, as far as it is about to be sealed.

    Args:
        new: new keys or values, ``[batch, heads, tokens, head_dim]``.
        tail: the open page with ``held`` tokens, whose padding is replaced in place.
        held: tokens in the open page.
        padding: bool ``[batch, pages * page_size]``, from the first token of the open page on.
        page_size: tokens per page.

    Returns:
        ``new`` with its padding replaced.
    """
    sealed = padding.shape[1] - held
    content = torch.cat([tail[:, :, :held], new[:, :, :sealed]], dim=2)
    content = replace_padding(content, padding, page_size)
    tail[:, :, :held] = content[:, :, :held]
    return torch.cat([content[:, :, held:], new[:, :, sealed:]], dim=2)
