"""Requests: how long their prompts and their answers are.

Drawn at random, lengths are log-normal, with the means that the vLLM paper (arXiv:2309.06180, section 6.1) reports for
ShareGPT: 161 tokens of prompt and 338 of answer.  The spreads are ours.  That is a mix that resembles ShareGPT, and it
is synthetic.

``sharegpt_lengths.csv`` is real: the lengths, and nothing else, of 256 turns of ShareGPT, drawn with a fixed seed
(``random.Random(0).sample``) from 3,000.  Their means are 281 tokens of prompt and 289 of answer (of the 3,000: 280 and
298); half of the prompts have at most 36.  Other lengths can be read from a file.
"""

import csv
import itertools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import BenchmarkInputError

PROMPT_MEAN, PROMPT_SIGMA = 161.0, 1.2
OUTPUT_MEAN, OUTPUT_SIGMA = 338.0, 0.9
SHORTEST_PROMPT, SHORTEST_OUTPUT = 4, 2
SHAREGPT_LENGTHS = Path(__file__).with_name("sharegpt_lengths.csv")


class Request(NamedTuple):
    """Tokens to read, and tokens to write (two or more: between them lies a time)."""

    prompt_tokens: int
    output_tokens: int


def draw_requests(count: int, *, seed: int = 0, max_prompt: int = 1024, max_output: int = 1024) -> list[Request]:
    """Requests of the synthetic mix, the same for the same seed; longer lengths are cut to the longest allowed.

    Raises:
        BenchmarkInputError: nothing to draw, or nothing that may be drawn.
    """
    if count < 1 or max_prompt < SHORTEST_PROMPT or max_output < SHORTEST_OUTPUT:
        raise BenchmarkInputError(
            f"{count} requests of at most {max_prompt} + {max_output} tokens cannot be drawn; use --requests 1, "
            f"--max-prompt {SHORTEST_PROMPT} or more and --max-output {SHORTEST_OUTPUT} or more."
        )
    generator = random.Random(seed)

    def length(mean: float, sigma: float, low: int, high: int) -> int:
        # A log-normal's mean is exp(mu + sigma^2 / 2).
        return min(high, max(low, round(generator.lognormvariate(math.log(mean) - sigma**2 / 2, sigma))))

    return [
        Request(
            length(PROMPT_MEAN, PROMPT_SIGMA, SHORTEST_PROMPT, max_prompt),
            length(OUTPUT_MEAN, OUTPUT_SIGMA, SHORTEST_OUTPUT, max_output),
        )
        for _ in range(count)
    ]


def read_requests(
    path: str, count: int, tokenizer: Any = None, *, max_prompt: int = 1024, max_output: int = 1024
) -> list[Request]:
    """The first ``count`` requests of a file.

    Args:
        path: JSON lines with ``prompt_tokens`` and ``output_tokens``; a .csv file with a heading and two columns, the
            tokens of prompts and of answers; or a ShareGPT file: one JSON list of ``{"conversations": [{"value": ..},
            {"value": ..}, ..]}``, whose first two turns are tokenized.
        count: most requests to take.
        tokenizer: for ShareGPT files.
        max_prompt, max_output: longer lengths are cut to these.

    Raises:
        BenchmarkInputError: it cannot be read, or holds no request.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        if Path(path).suffix == ".csv":
            pairs = _columns(text, count)
        else:
            pairs = _conversations(text, count, tokenizer) if text.lstrip().startswith("[") else _lines(text, count)
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise BenchmarkInputError(f"cannot read the requests {path!r}: {reason}; give a JSON or CSV file.") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BenchmarkInputError(
            f"{path!r} is no file of requests ({type(error).__name__}: {error}); give JSON lines with prompt_tokens "
            "and output_tokens, two columns of CSV, or a ShareGPT file and a model with a tokenizer."
        ) from error
    if not pairs:
        raise BenchmarkInputError(f"{path!r} holds no request; give another file.")
    return [
        Request(min(max_prompt, max(1, prompt)), min(max_output, max(SHORTEST_OUTPUT, output)))
        for prompt, output in pairs
    ]


def sharegpt_requests(count: int, *, max_prompt: int = 1024, max_output: int = 1024) -> list[Request]:
    """Lengths of real turns of ShareGPT, always the same: the first ``count`` of ``SHAREGPT_LENGTHS``, and again from
    the first on where they end; longer lengths are cut to the longest allowed."""
    drawn = read_requests(str(SHAREGPT_LENGTHS), count, max_prompt=max_prompt, max_output=max_output)
    return list(itertools.islice(itertools.cycle(drawn), count))


def _columns(text: str, count: int) -> list[tuple[int, int]]:
    rows = csv.reader(text.splitlines()[1 : count + 1])
    return [(int(prompt), int(output)) for prompt, output in rows]


def _lines(text: str, count: int) -> list[tuple[int, int]]:
    rows = [json.loads(line) for line in text.splitlines() if line.strip()][:count]
    return [(int(row["prompt_tokens"]), int(row["output_tokens"])) for row in rows]


def _conversations(text: str, count: int, tokenizer: Any) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for entry in json.loads(text):
        turns: Sequence[Any] = entry["conversations"]
        if len(turns) >= 2 and len(found) < count:
            if tokenizer is None:
                raise ValueError("no tokenizer")
            lengths = [len(tokenizer(turn["value"], add_special_tokens=False).input_ids) for turn in turns[:2]]
            found.append((lengths[0], lengths[1]))
    return found
