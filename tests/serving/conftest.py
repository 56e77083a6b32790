"""What needs transformers 5.23 or newer and the packages of a server is not collected without them."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

from kvquant_hf.batching.hooks import unsupported

MISSING = [name for name in ("fastapi", "openai", "prometheus_client", "uvicorn") if not importlib.util.find_spec(name)]
collect_ignore_glob = ["test_*.py"] if unsupported() or MISSING else []


@pytest.fixture(scope="module")
def served() -> Iterator[Any]:
    """A server of the tiny model with int4, which many tests ask."""
    from serving.servers import serving

    with serving(policy="int4", kv_budget=4_000_000, max_concurrent=4, queue=200) as found:
        yield found
