"""Writes data for the tasks beside this file: made-up word problems, and questions cut from a text of your own.

    python benchmarks/lm_eval/make_data.py wiki.test.tokens --out data

``synthetic_gsm8k_{train,test}.jsonl``: word problems with one step of arithmetic from the templates below, in the
format of GSM8K (``question``, and ``answer`` that ends with ``#### 18``); far easier, and no substitute for it.

``choices.jsonl``: 100 words of the text, and the word that follows among three others of the same frequency.

``needle.jsonl``: the beginning of the text with five digits hidden in it, in three lengths and at five depths.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from kvquant_hf.evaluation.needle import NEEDLE, QUESTION, draw_digits

Row = dict[str, Any]

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida", "Jack")
THINGS = ("apples", "books", "coins", "marbles", "pencils", "shells", "stamps", "tickets")
# Question, answer, and what is computed from a > b.
TEMPLATES: tuple[tuple[str, str, Callable[[int, int], int]], ...] = (
    (
        "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
        "{name} has {a} + {b} = {c} {things}.",
        lambda a, b: a + b,
    ),
    (
        "{name} has {a} {things} and gives {b} of them away. How many {things} are left?",
        "{name} has {a} - {b} = {c} {things} left.",
        lambda a, b: a - b,
    ),
    (
        "{name} fills {b} boxes with {a} {things} each. How many {things} are in the boxes?",
        "There are {a} * {b} = {c} {things} in the boxes.",
        lambda a, b: a * b,
    ),
)
CONTEXT_WORDS = 100
MIN_COUNT = 20  # words as frequent as this are one token for most models, and score four choices in one pass
CHARACTERS, DEPTHS = (2000, 6000, 12000), (0, 25, 50, 75, 100)


def word_problems(count: int, rng: random.Random) -> list[Row]:
    """``count`` problems with ``question`` and ``answer``, no two alike."""
    rows: dict[str, Row] = {}
    while len(rows) < count:
        question, answer, compute = rng.choice(TEMPLATES)
        a = rng.randint(3, 12)
        b = rng.randint(2, a - 1)
        words = {"name": rng.choice(NAMES), "things": rng.choice(THINGS), "a": a, "b": b, "c": compute(a, b)}
        asked = question.format(**words)
        rows[asked] = {"question": asked, "answer": f"{answer.format(**words)}\n#### {words['c']}"}
    return list(rows.values())


def next_words(text: str, count: int, rng: random.Random) -> list[Row]:
    """``count`` questions with ``context``, four ``choices`` and the index of the true one, ``answer``."""
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    words = [text[start:end] for start, end in spans]
    counts = Counter(word for word in words if re.fullmatch("[a-z]{4,}", word))
    ranked = [word for word, n in counts.most_common() if n >= MIN_COUNT]
    rank = {word: i for i, word in enumerate(ranked)}
    places = [i for i, word in enumerate(words) if i >= CONTEXT_WORDS and word in rank]
    if len(places) < count or len(ranked) < 11:
        raise typer.BadParameter(f"too little text for {count} questions; give a longer one, or fewer --questions")
    rows = []
    for place in sorted(rng.sample(places, count)):
        true, at = words[place], rank[words[place]]
        neighbours = [word for word in ranked[max(0, at - 20) : at + 21] if word != true]
        options = rng.sample(neighbours, 3)
        answer = rng.randrange(4)
        options.insert(answer, true)
        context = text[spans[place - CONTEXT_WORDS][0] : spans[place - 1][1]]
        rows.append({"context": context, "choices": options, "answer": answer})
    return rows


def needles(text: str, seed: int) -> list[Row]:
    """Prompts with ``prompt`` and ``answer``, and where the needle is: ``characters`` of text, ``depth`` in percent."""
    rows = []
    for characters in CHARACTERS:
        for depth in DEPTHS:
            digits, cut = draw_digits(seed, characters, depth), characters * depth // 100
            prompt = text[:cut] + NEEDLE.format(digits=digits) + text[cut:characters] + QUESTION
            rows.append({"prompt": prompt, "answer": digits, "characters": characters, "depth": depth})
    return rows


def main(
    text: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A UTF-8 file: the WikiText-2 test.")],
    out: Annotated[Path, typer.Option(help="The folder to write to.")],
    problems: Annotated[int, typer.Option(min=1, max=1000, help="Word problems for the test.")] = 64,
    questions: Annotated[int, typer.Option(min=1, help="Multiple-choice questions.")] = 128,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
) -> None:
    """Write data for lm-eval tasks that need no download."""
    content = text.read_text(encoding="utf-8")
    drawn = word_problems(problems + 5, random.Random(f"word problems {seed}"))
    files = {
        "synthetic_gsm8k_train": drawn[:5],
        "synthetic_gsm8k_test": drawn[5:],
        "choices": next_words(content, questions, random.Random(f"next words {seed}")),
        "needle": needles(content, seed),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        path = out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    typer.run(main)
