"""Two small tasks for lm-eval, in a folder: one that generates, one of multiple choice, with scores that vary."""

from pathlib import Path

NAMES = ["small_words", "small_choices"]

_GENERATION = """\
task: small_words
custom_dataset: !function small.documents
output_type: generate_until
test_split: test
fewshot_split: train
num_fewshot: 2
doc_to_text: "{{text}} ="
doc_to_target: " {{number}}"
process_results: !function small.judge
generation_kwargs: {until: ["never"], do_sample: false, max_gen_toks: 6}
metric_list:
  - {metric: odd, aggregation: mean, higher_is_better: true}
  - {metric: mean_byte, aggregation: mean, higher_is_better: true}
  - {metric: pair, aggregation: median, higher_is_better: true}
metadata: {version: 1.0}
"""
_CHOICE = """\
task: small_choices
custom_dataset: !function small.documents
output_type: multiple_choice
test_split: test
doc_to_text: "{{text}}"
doc_to_choice: [" a", " b"]
doc_to_target: number
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
# Metrics without meaning: they depend on each byte of an answer, so that caches differ in them.  ``pair`` is no number.
_CODE = """
from datasets import Dataset, DatasetDict

def documents(*, first="", **_):
    rows = [{"text": f"{first}{'word ' * (9 + 5 * (i % 4))}{i}", "number": i % 2} for i in range(12)]
    return DatasetDict({"test": Dataset.from_list(rows[:7]), "train": Dataset.from_list(rows[7:])})

def judge(doc, results):
    data = results[0].encode()
    return {"odd": sum(data) % 2, "mean_byte": sum(data) / max(1, len(data)), "pair": (1, 2)}
"""


def write_tasks(folder: Path) -> Path:
    """Put the tasks into ``folder``, which is there already.  ``first`` in the metadata begins each document."""
    for name, text in (("words.yaml", _GENERATION), ("choices.yaml", _CHOICE), ("small.py", _CODE)):
        (folder / name).write_text(text, encoding="utf-8")
    return folder
