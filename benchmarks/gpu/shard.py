"""A plugin of pytest: run every n-th test only, from the environment variable ``SHARD="<first>/<n>"``.

For running tests in several processes where pytest-xdist is not installed: ``pytest -p gpu.shard``.
"""

import os
from typing import Any


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Keep the tests of this shard."""
    first, count = map(int, os.environ["SHARD"].split("/"))
    kept = items[first::count]
    config.hook.pytest_deselected(items=[item for n, item in enumerate(items) if n % count != first])
    items[:] = kept
