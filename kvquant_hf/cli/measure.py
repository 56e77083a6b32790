"""What ``kvquant demo`` measures of one policy, all of it greedy and on the same text.

The long text is the Python language reference from the standard library.  Its first ``context - 1`` tokens are read in
one forward pass into a fresh cache.  From there, on two copies of the cache:

* the next 256 tokens of the text are read in chunks of 64, through the cache; the share of positions at which the most
  likely next token is that of the ``exact`` policy is the top-1 agreement, and the cache is weighed afterwards;
* the text is continued token by token; tokens per second are of these steps alone, from the median step, so that a
  busy moment of the machine does not count (nor does sealing a page, one step in 64).
"""

import copy
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

from ..cache import QuantizedPagedCache
from ..transformers_api.names import with_cache
from .models import LoadedModel, encode_prompt
from .terminal import CommandError, InputError

QUESTION = "Explain in two sentences why the sky is blue."
AGREEMENT_POSITIONS = 256
CHUNK = 64


@dataclass(frozen=True)
class Result:
    """One policy; the fields that ``CacheReport`` has too mean the same here, ``text`` continues the long text."""

    bytes: int
    ratio: float
    bits_per_element: float
    page_bits_per_element: float
    top1_agreement: float
    tokens_per_second: float
    text: str
    answer: str
    fallback_calls: int

    def as_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)


def long_text() -> str:
    """About 0.46 MB of English prose about Python, always in the same order.

    Raises:
        CommandError: this Python came without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CommandError(
            "this Python lacks the standard library's pydoc_data, the demo's long text; use a complete Python."
        ) from error
    return "\n\n".join(topics[name] for name in sorted(topics))


class Bench:
    """Measures policies on one model.

    Args:
        loaded: the model.
        context: tokens of the long text.
        new_tokens: tokens to continue it by, and the most that an answer may have.

    Raises:
        InputError: the model or the text is too short for ``context``.
    """

    def __init__(self, loaded: LoadedModel, context: int, new_tokens: int) -> None:
        self.loaded = loaded
        self.context = context
        self.new_tokens = new_tokens
        self._reference: Any = None
        limit = getattr(loaded.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        ahead = max(AGREEMENT_POSITIONS, new_tokens)
        if limit and context + ahead > limit:
            raise InputError(f"this model takes {limit} tokens; use at most --context {limit - ahead}.")
        ids = loaded.tokenizer(long_text(), return_tensors="pt").input_ids
        if ids.shape[1] < context + AGREEMENT_POSITIONS:
            most = ids.shape[1] - AGREEMENT_POSITIONS
            raise InputError(f"the long text has {ids.shape[1]} tokens; use at most --context {most}.")
        self.ids = ids[:, : context + AGREEMENT_POSITIONS].to(loaded.model.device)
        self.question = encode_prompt(loaded, QUESTION)

    def measure(self, policy: str) -> Result:
        """All of the above for one policy; ``exact`` must be the first."""
        import torch

        model = self.loaded.model
        with torch.no_grad():
            answer = self._answer(policy)
            cache = QuantizedPagedCache(model.config, policy)
            cache.bind(model)
            self._forward(self.ids[:, : self.context - 1], cache, last_only=True)
            text, speed = self._continue(copy.deepcopy(cache))
            choices = self._read_on(cache)
        if self._reference is None:
            self._reference = choices
        report = cache.report()
        return Result(
            bytes=report.bytes,
            ratio=report.ratio,
            bits_per_element=report.bits_per_element,
            page_bits_per_element=report.page_bits_per_element,
            top1_agreement=float((choices == self._reference).float().mean()),
            tokens_per_second=speed,
            text=text,
            answer=answer,
            fallback_calls=report.fallback_calls,
        )

    def _forward(self, ids: Any, cache: QuantizedPagedCache, *, last_only: bool = False) -> Any:
        """Most likely next token at each position, ``[tokens]`` (``last_only``: ``[1]``)."""
        # Logits of a whole prompt would be the largest tensor of all.
        options = {"logits_to_keep": 1} if last_only and self.loaded.model._supports_logits_to_keep() else {}
        return self.loaded.model(ids, use_cache=True, **with_cache(cache), **options).logits[0].argmax(-1)

    def _answer(self, policy: str) -> str:
        """The answer to ``QUESTION``."""
        cache = QuantizedPagedCache(self.loaded.model.config, policy)
        output = self.loaded.model.generate(
            **self.question, **with_cache(cache), max_new_tokens=self.new_tokens, do_sample=False
        )
        new = output[0, self.question["input_ids"].shape[1] :]
        return str(self.loaded.tokenizer.decode(new, skip_special_tokens=True)).strip()

    def _read_on(self, cache: QuantizedPagedCache) -> Any:
        """Most likely next tokens along the real text, ``[AGREEMENT_POSITIONS]``."""
        import torch

        start = self.context - 1  # the last token of the context is the first to be read through the cache
        chunks = self.ids[:, start : start + AGREEMENT_POSITIONS].split(CHUNK, dim=1)
        return torch.cat([self._forward(chunk, cache) for chunk in chunks])

    def _continue(self, cache: QuantizedPagedCache) -> tuple[str, float]:
        """The continuation of the long text, and tokens per second."""
        last = self.ids[:, self.context - 1 : self.context]
        self._forward(last, copy.deepcopy(cache))  # whatever is set up at the first step is not timed
        tokens, seconds = [], []
        for _ in range(self.new_tokens):
            start = time.perf_counter()
            token = self._forward(last, cache)
            tokens.append(int(token))  # waits for the device
            seconds.append(time.perf_counter() - start)
            last = token.view(1, 1)
        eos = self.loaded.model.generation_config.eos_token_id
        ends = [i for i, token in enumerate(tokens) if token in (eos if isinstance(eos, list) else [eos])]
        text = self.loaded.tokenizer.decode(tokens[: ends[0] if ends else None], skip_special_tokens=True)
        return str(text), 1 / statistics.median(seconds)
