"""The column of docs/support.md on continuous batching, cell by cell: what `make test-batching` runs, too."""

import pytest
from support.architectures import ARCHITECTURES
from support.outcomes import BATCHING, PAGES, REFUSED
from support.page import STATED, check_cell, is_measured

from kvquant_hf.batching.hooks import unsupported


@is_measured
@pytest.mark.filterwarnings("ignore")  # of two dozen models of transformers'
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cell(name: str) -> None:
    check_cell(name, BATCHING)


@is_measured
@pytest.mark.skipif(bool(unsupported()), reason="this transformers has no continuous batching for it")
def test_most_are_right_and_the_others_have_a_remedy() -> None:
    cells = [row[BATCHING] for row in STATED.values()]
    assert sum(text == PAGES for text, _ in cells) >= 12
    assert all(text == REFUSED and "use generate()" in reason for text, reason in cells if text != PAGES)
