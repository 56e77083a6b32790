"""The real model of these tests, loaded once; without it they are skipped with the reason."""

from typing import Any

import pytest

from kvquant_hf.cli.models import load_model
from kvquant_hf.cli.terminal import CommandError


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    try:
        loaded = load_model(None, "float32", hidden=True)
    except CommandError as error:
        pytest.skip(str(error))
    return loaded.model, loaded.tokenizer
