"""A continuation decoded through quantized caches, token by token, beside the exact model: errors that accumulate.

The first tokens of each window are a prompt.  The exact model (transformers' own cache) continues it greedily, and
every contender is fed each of these tokens as it comes, in a forward pass of its own, as ``generate`` feeds a cache:
what is held is quantized while it decodes.  All see the exact model's tokens, so distributions can be compared position
by position; in free generation the first token that differs would make the rest another text.  An end of text is a
token like any other here: positions after it count.

Prompts are read a page at a time, as ``harness.evaluate`` reads text, which afterwards reads the whole text in such
chunks, with fresh caches.  The two readings differ in nothing but in how tokens came into the cache.  With pages that
are sealed lazily a chunk attends to what its tokens attend to one by one, so both have the same KLD up to rounding; a
cache whose storage depends on how tokens arrive has not.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..errors import EvaluationInputError
from .harness import Contender, Held, Reading, Result, evaluate, of_all_windows
from .metrics import summarize

QUARTERS = 4


class Decoded(NamedTuple):
    """One contender: read token by token, and the same tokens read in chunks.

    Args:
        result: of decoding, over the positions that predict a token of the continuation.
        chunked: mean KLD in nats over the same positions of the same tokens, read a page at a time.
        quarters: mean KLD in nats of each quarter of the positions, in order, over all windows.
    """

    result: Result
    chunked: float
    quarters: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """What ``Result`` has, and ``kld_mean_chunked`` and ``kld_mean_quarter_1`` to ``_4``, ready for JSON."""
        quarters = {f"kld_mean_quarter_{i}": kld for i, kld in enumerate(self.quarters, 1)}
        return self.result.as_dict() | {"kld_mean_chunked": self.chunked} | quarters


def check_prompt(prompt: int, context: int) -> None:
    """Raise ``EvaluationInputError`` unless ``prompt`` of ``context`` tokens leave a position for each quarter."""
    if not 1 <= prompt <= context - QUARTERS:
        raise EvaluationInputError(
            f"a prompt of {prompt} tokens leaves {max(0, context - prompt)} of {context} to decode, and the quarters "
            f"need {QUARTERS}; use a smaller --prompt or a larger --context."
        )


def passes(prompt: int, context: int, page_size: int) -> int:
    """Forward passes that :func:`decode` makes for a batch of windows and a contender."""
    return -(-prompt // page_size) + context - prompt + -(-context // page_size)


def decode(
    model: Any,
    prompts: torch.Tensor,
    context: int,
    contenders: Sequence[Contender],
    *,
    page_size: int = 64,
    batch: int = 1,
    advance: Callable[[str], object] = lambda name: None,
) -> tuple[torch.Tensor, dict[str, Decoded]]:
    """Continue ``prompts`` through every contender and compare it with the exact model at each position.

    Args:
        model: a causal language model in eval mode.
        prompts: token ids ``[windows, prompt]``.
        context: tokens of prompt and continuation together.
        contenders: what to measure; names are distinct.
        page_size: tokens per page of the contenders, and per chunk.
        batch: windows decoded side by side.
        advance: called with the name of each contender after each of its chunks (``""``: the exact model).

    Returns:
        The prompts with their continuations, int64 ``[windows, context]`` on the CPU, and results by contender over
        ``context - prompt`` positions of each window.

    Raises:
        EvaluationInputError: the prompt leaves too few tokens to decode.
        UnsupportedModelError: not a decoder-only model.
        EvaluationError: NaN among the logits, or a cache that was not read.
    """
    check_prompt(prompts.shape[1], context)
    texts, readings = [], []
    with torch.inference_mode():
        for rows in prompts.to(model.device).split(batch):
            text, held = _continue(rows, context, page_size, Reading(model, contenders, advance))
            texts.append(text.cpu())
            readings.append(held)
    text = torch.cat(texts)
    chunked = evaluate(model, text, contenders, step=page_size, page_size=page_size, batch=batch, advance=advance)
    first = prompts.shape[1] - 1  # the position that predicts the first token of the continuation
    results = {}
    for name, (scores, storage) in of_all_windows(readings).items():
        new = type(scores)(*(column[:, first:] for column in scores))
        quarters = tuple(float(part.mean()) for part in new.kld.tensor_split(QUARTERS, dim=1))
        result = Result(summarize(new, max(0, page_size - first)), storage, new)
        results[name] = Decoded(result, float(chunked[name].scores.kld[:, first:].mean()), quarters)
    return text, results


def _continue(text: torch.Tensor, context: int, page_size: int, reading: Reading) -> tuple[torch.Tensor, Held]:
    """One batch: the prompt a page at a time, then one token at a time, each the exact model's most likely one."""
    prompt, start = text.shape[1], 0
    while start < context:
        chunk = text[:, start : start + page_size]  # one token as soon as the prompt has been read
        exact = reading.exact(chunk)
        end = start + chunk.shape[1]
        if prompt <= end < context:
            text = torch.cat([text, exact[:, -1:].argmax(-1)], dim=1)
        reading.contenders(chunk, exact, text[:, start + 1 : end + 1])
        start = end
    return text, reading.close()
