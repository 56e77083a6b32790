"""The settings of one request of a batch: its generation config and its seed."""

import copy
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..errors import BatchingError

# What one request in a batch cannot have, and the values that do not ask for it.
_REFUSED: dict[str, tuple[Any, str]] = {
    "num_beams": ((None, 1), "beams"),
    "penalty_alpha": ((None, 0, 0.0), "contrastive search"),
    "dola_layers": ((None,), "DoLa"),
    "guidance_scale": ((None, 1, 1.0), "classifier-free guidance, which runs the model twice"),
    "watermarking_config": ((None,), "watermarks"),
    "prompt_lookup_num_tokens": ((None,), "assisted generation"),
    "stop_strings": ((None,), "stop strings, which need the tokenizer"),
    "max_time": ((None,), "a time limit"),
    "encoder_repetition_penalty": ((None, 1, 1.0), "a penalty on an encoder's tokens"),
    "encoder_no_repeat_ngram_size": ((None, 0), "n-grams of an encoder's tokens"),
    "forced_eos_token_id": ((None,), "forced last token, whose place in the batch is not known before"),
}
_NOT_TOLD = ("max_new_tokens", "transformers_version")  # no token is chosen by them


@dataclass(frozen=True)
class Sampling:
    """The settings of one request, which it carries through queues and to other processes.

    Two are equal if their requests go through the same processors.

    Args:
        config: a generation config of its own; never written to.
        key: equal for equal settings.
        seed: where the request's random numbers begin.
    """

    config: Any = field(compare=False)
    key: str
    seed: int = field(compare=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Sampling":
        """Forks and requests that are computed again share it."""
        return self

    def draw(self, request_id: str, position: int) -> float:
        """A number in [0, 1) that decides token ``position`` of a request; forks have numbers of their own."""
        child = request_id.rpartition("__child#")[2] if "__child#" in request_id else ""
        return random.Random(f"{self.seed}/{child}/{position}").random()


def settings_of(base: Any, own: Any, seed: int, changes: dict[str, Any]) -> Sampling:
    """What a request asks for.

    Args:
        base: the manager's generation config: what the request leaves open.
        own: the request's generation config, or None; what is None in it is left open.
        seed: where its random numbers begin.
        changes: single settings by name, which count before both.

    Raises:
        BatchingError: a setting that does not exist, or that a request in a batch cannot have.
    """
    config = copy.copy(base)
    given = {} if own is None else {name: value for name, value in vars(own).items() if value is not None}
    for name, value in (given | changes).items():
        if name.startswith("_"):
            continue
        if not hasattr(config, name):
            raise BatchingError(
                f"a request has no setting {name!r}; settings are those of GenerationConfig, and seed for its numbers."
            )
        setattr(config, name, value)
    check_config(config)
    return Sampling(config, repr(sorted(_told(config))), seed)


def check_config(config: Any) -> None:
    """Refuse what requests of a batch cannot have.

    Raises:
        BatchingError: ``config`` asks for it.
    """
    for name, (harmless, what) in _REFUSED.items():
        value = getattr(config, name, None)
        if value not in harmless:
            raise BatchingError(f"continuous batching has no {what} ({name}={value!r}); use generate() for it.")


def _told(config: Any) -> Iterable[tuple[str, str]]:
    """What a config says, in a form to compare."""
    for name, value in vars(config).items():
        if value is not None and not name.startswith("_") and name not in _NOT_TOLD:
            yield name, repr(value)
