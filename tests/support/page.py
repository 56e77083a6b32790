"""What docs/support.md says of the installed transformers, and the comparison with what runs."""

import re

import pytest
from support.outcomes import evaluate
from support.table import DOCUMENT, HERE, parse

TEXT = DOCUMENT.read_text(encoding="utf-8")
MEASURED = re.findall(r"\d+\.\d+", re.search(r"transformers ([\d., and]+)\.\n", TEXT)[1])
STATED = parse(TEXT[TEXT.index("| architecture |") :].partition("\n## The ways")[0], HERE)

is_measured = pytest.mark.skipif(
    HERE not in MEASURED, reason=f"docs/support.md speaks of transformers {', '.join(MEASURED)}"
)


def check_cell(name: str, column: str) -> None:
    """Compare a cell with what runs here."""
    found = evaluate(name, column)
    stated = STATED.get(name, {}).get(column)
    assert (found.text, found.reason.replace("|", "/")) == stated, (
        f"docs/support.md says {stated} of {column} on {name}, transformers {HERE} gives ({found.text!r}, "
        f"{found.reason!r}) {found.detail}: regenerate it with `make docs-support` if that is meant to be"
    )
