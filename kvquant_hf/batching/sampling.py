"""How each request of a batch chooses its tokens: by its own generation config, from its own stream of random numbers.

transformers' continuous batching has one generation config for all requests, leaves out processors that need a
request's history, and draws from torch's global generator, so that an answer depends on its neighbours.  Here a
request's processors are those that ``generate`` would use, with its own history, and the number that decides its n-th
token follows from its seed and n alone: an answer is the same alone, among others, and after it was dropped and
computed again.
"""

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from transformers.generation import logits_process
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.logits_process import LogitsProcessorList

from ..errors import BatchingError
from .settings import Sampling

_SAMPLING = "sampling"  # the key under which a request of transformers carries a ``Sampling``

# Processors that look at scores only: requests with equal settings go through them together.
_WITHOUT_HISTORY = tuple(
    getattr(logits_process, name)
    for name in (
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TopHLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "LogitNormalization",
        "InfNanRemoveLogitsProcessor",
        "SuppressTokensLogitsProcessor",
    )
    if hasattr(logits_process, name)
)


class RequestProcessors(ContinuousBatchingLogitsProcessorList):
    """What transformers asks about processors: there are none for a whole batch, and requests may have any setting."""

    def __init__(self) -> None:
        super().__init__(LogitsProcessorList())

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """Nothing to refuse: ``settings_of`` did, in the thread of whoever asked."""


class RequestRunner(ModelRunner):
    """transformers' runner of steps, in which each request chooses its token by its own settings.

    Args:
        model: the model, which knows how processors are made.
        default: the settings of requests that bring none (those that transformers makes to warm up).
        kwargs: as there.
    """

    def __init__(self, model: Any, default: Sampling, **kwargs: Any) -> None:
        super().__init__(do_sample=False, **kwargs)
        self._default = default
        self.failed: dict[str, Exception] = {}  # requests whose processors raised in a step, which others survive
        self._made = functools.lru_cache(maxsize=256)(functools.partial(make_processors, model))

    def _sample(self, scores: torch.Tensor, output_ids: torch.Tensor) -> None:
        """As transformers': write the next tokens, and their log probabilities if they are wanted.

        Args:
            scores: ``[1, requests, vocabulary]``, float32: a row for each request that gets a token, then as many
                without meaning as there are requests whose prompt is not at its end.
            output_ids: ``[1 or 2, at least tokens]``, int32.
        """
        states = [x.state for x in self.inputs_and_outputs.requests_in_batch if x.has_new_token]
        rows = scores[0, : len(states)]
        tokens, chances = self.choose(rows, states)
        output_ids[0, : len(states)].copy_(tokens)
        if self.return_logprobs:
            logs = torch.log_softmax(chances, dim=-1).gather(1, tokens[:, None])[:, 0]
            output_ids[1, : len(states)].copy_(logs.view(torch.int32))

    def choose(self, rows: torch.Tensor, states: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """The next token of each request.

        Args:
            rows: ``[requests, vocabulary]``, float32.
            states: the requests.

        Returns:
            Tokens ``[requests]``, and the scores that they were chosen by, as ``rows``.
        """
        together: dict[Any, list[int]] = {}
        for i, state in enumerate(states):
            processors, alike = self._processors(state)
            together.setdefault(alike if processors else None, []).append(i)
        if list(together) != [None]:
            rows = rows.clone()
            for which in (x for key, x in together.items() if key is not None):
                state = states[which[0]]
                processors, alike = self._processors(state)
                history = torch.tensor([_tokens(state)], device=rows.device) if alike == state.request_id else None
                try:
                    rows[which] = processors(history, rows[which])
                except Exception as error:
                    self.failed |= {states[i].request_id: error for i in which}
        tokens = rows.argmax(dim=-1)
        drawn = [i for i, state in enumerate(states) if self._settings(state).config.do_sample]
        if drawn:
            numbers = [self._settings(x).draw(x.request_id, _new(x)) for x in (states[i] for i in drawn)]
            tokens[drawn] = draw(rows[drawn], numbers)
        return tokens, rows

    def _settings(self, state: Any) -> Sampling:
        found: Sampling = state.logit_processor_kwargs.get(_SAMPLING, self._default)
        return found

    def _processors(self, state: Any) -> tuple[LogitsProcessorList, Any]:
        """A request's processors, and a key that is equal for those that may share a call of them."""
        sampling = self._settings(state)
        processors = self._made(sampling, _prompt(state))
        alike = all(isinstance(x, _WITHOUT_HISTORY) for x in processors)
        return processors, sampling.key if alike else state.request_id


def make_processors(model: Any, sampling: Sampling, prompt: int) -> LogitsProcessorList:
    """The processors that ``generate`` would use.

    Args:
        model: the model.
        sampling: the request's settings.
        prompt: tokens of its prompt.

    Raises:
        ValueError: a setting is out of its range.
    """
    config = copy.copy(sampling.config)
    if config.eos_token_id in (-1, [-1]):  # none, in transformers' batching
        config.eos_token_id = None
    model._prepare_special_tokens(config, device=model.device)
    made: LogitsProcessorList = model._get_logits_processor(config, input_ids_seq_length=prompt, device=model.device)
    return made


def _vocabulary(model: Any) -> int:
    """Scores that a model gives."""
    found: int = model.get_output_embeddings().weight.shape[0]
    return found


def check_range(model: Any, sampling: Sampling, prompt: list[int]) -> None:
    """Refuse settings out of range before the request is among others: try them on scores.

    Raises:
        BatchingError: one is.
    """
    try:
        processors = make_processors(model, sampling, len(prompt))
        if processors:
            scores = torch.zeros(1, _vocabulary(model), device=model.device)
            processors(torch.tensor([prompt], device=model.device), scores)
    except Exception as error:
        raise BatchingError(f"a request's settings are refused: {str(error).rstrip('.')}.") from error


def carried(sampling: Sampling) -> dict[str, Any]:
    """What ``add_request`` of transformers takes along."""
    return {_SAMPLING: sampling}


def draw(rows: torch.Tensor, numbers: Sequence[float]) -> torch.Tensor:
    """Tokens at given places of the distributions that scores stand for.

    Args:
        rows: scores ``[requests, vocabulary]``.
        numbers: in [0, 1), one for each row.

    Returns:
        ``[requests]``: the first token at which the sum of probabilities exceeds the number; never one whose
        probability is 0.  Where there are no probabilities (scores beyond all bounds), the token with the best score.
    """
    sums = torch.softmax(rows.double(), dim=-1).cumsum(dim=-1)
    most = sums[:, -1:]
    at = torch.tensor(numbers, dtype=torch.float64, device=rows.device)[:, None] * most
    at = torch.minimum(at, torch.nextafter(most, torch.zeros_like(most)))
    found = torch.searchsorted(sums, at, right=True)[:, 0]
    return torch.where(most[:, 0].isfinite(), found, rows.argmax(dim=-1))


def _prompt(state: Any) -> int:
    """Tokens of the prompt; a request that is computed again carries earlier new tokens in it."""
    return state._true_initial_tokens or len(state.initial_tokens)


def _tokens(state: Any) -> list[int]:
    tokens: list[int] = state.initial_tokens + state.generated_tokens
    return tokens


def _new(state: Any) -> int:
    """Tokens that a request has generated."""
    return len(_tokens(state)) - _prompt(state)
