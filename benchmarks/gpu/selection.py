"""A plugin of pytest for the gate: which kernel tests run in this process, and a line of JSON for each as it ends.

For running tests in several processes where pytest-xdist is not installed: ``pytest -p gpu.selection``, with the
environment variable ``GATE`` as ``Asked`` describes it.  A test runs if it asks for the fixture ``device``, which is
what makes it run on the GPU, and if it is about one of the codecs that are to be measured or about none in particular.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import pytest


class Asked(TypedDict):
    """``shard`` of ``shards``, from 0; ``codecs`` to be measured; ``names``: for each codec and policy, its codecs; the
    file ``report``, to which lines are appended:

    ``{"tests": {<name>: [<codec>, ...]}, "aside": {"codecs": n, "device": n}}`` once, when tests are chosen;
    ``{"test": <name>, "outcome": "passed", "failed" or "skipped"}`` for each test as it ends.
    """

    shard: int
    shards: int
    codecs: list[str]
    names: dict[str, list[str]]
    report: str


def named(values: Iterable[object], names: Mapping[str, Iterable[str]]) -> set[str]:
    """Codecs that are among ``values`` or in tuples and lists there, as objects, by name, or by a policy's name."""
    found: set[str] = set()
    for value in values:
        if isinstance(value, tuple | list):
            found |= named(value, names)
        else:
            name = value if isinstance(value, str) else getattr(value, "name", None)
            found.update(names.get(name, ()) if isinstance(name, str) else ())
    return found


def codecs_of(item: Any, names: Mapping[str, Iterable[str]]) -> set[str]:
    """The codecs that a test is about: those of its parameters, or else those that its function names.

    Empty for a test of something that they all share.
    """
    parameters = named(item.callspec.params.values(), names) if hasattr(item, "callspec") else set()
    code = item.function.__code__
    written = [item.function.__globals__[name] for name in code.co_names if name in item.function.__globals__]
    return parameters or named([*code.co_consts, *written], names)


def _name(item: Any) -> str:
    """File and test, without the folder."""
    return f"{item.path.name}::{item.nodeid.partition('::')[2]}"


class Reporter:
    """Chooses the tests and reports on them."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._worst: dict[str, str] = {}

    def _write(self, line: dict[str, Any]) -> None:
        with Path(self._asked["report"]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    @pytest.hookimpl(trylast=True)  # what -m leaves
    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Keep this process's share of the tests that are asked for."""
        wanted = set(self._asked["codecs"])
        about = {item: codecs_of(item, self._asked["names"]) for item in items}
        on_device = [item for item in items if "device" in item.fixturenames]
        chosen = [item for item in on_device if not about[item] or about[item] & wanted]
        mine = chosen[self._asked["shard"] :: self._asked["shards"]]
        aside = {"codecs": len(on_device) - len(chosen), "device": len(items) - len(on_device)}
        self._write({"tests": {_name(item): sorted(about[item]) for item in mine}, "aside": aside})
        config.hook.pytest_deselected(items=[item for item in items if item not in mine])
        items[:] = mine

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Iterator[None]:
        """Keep the worst of setup, call and teardown, and write the line of a test behind the last."""
        report = (yield).get_result()
        before = self._worst.get(item.nodeid, "passed")
        self._worst[item.nodeid] = max(before, report.outcome, key=["passed", "skipped", "failed"].index)
        if call.when == "teardown":
            self._write({"test": _name(item), "outcome": self._worst.pop(item.nodeid)})


def pytest_configure(config: Any) -> None:
    """Begin."""
    config.pluginmanager.register(Reporter(json.loads(os.environ["GATE"])))
