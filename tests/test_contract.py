"""What is relied on in transformers: each row of the table is used, each use has a row, and what is lost is named."""

import ast
import importlib
import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest

from kvquant_hf import versions
from kvquant_hf.batching.hooks import OLDEST, require_support, unsupported
from kvquant_hf.errors import KVQuantVersionWarning, UnsupportedVersionError
from kvquant_hf.transformers_api.contract import (
    BATCHING,
    CONTRACT,
    LATENTS,
    PIPELINE,
    PIPELINE_BATCHING,
    Row,
    broken,
    require,
)
from kvquant_hf.versions import NEWEST_TESTED, check_version

PACKAGE = Path(versions.__file__).parent
# What runs whenever a model generates; commands and measurements import more, where they need it.
ROWS = CONTRACT + LATENTS + BATCHING + PIPELINE + PIPELINE_BATCHING
RUNTIME = sorted(path for room in ("", "transformers_api", "batching") for path in (PACKAGE / room).glob("*.py"))
SOURCES = {path: path.read_text(encoding="utf-8") for path in RUNTIME if path.name != "contract.py"}

MODULES = {"configuration_utils", "logits_process", "output_capturing", "utils"}

BEFORE_BATCHING = f"needs transformers {OLDEST}" in unsupported()


def owner(row: Row) -> tuple[object, str]:
    """What has the last part of a row's name, and that part."""
    found: object = importlib.import_module(row.module)
    *path, last = row.name.split(".")
    for part in path:
        found = getattr(found, part)
    return found, last


def test_all_of_it_is_there() -> None:
    assert broken(CONTRACT + LATENTS + PIPELINE) == []


@pytest.mark.skipif(BEFORE_BATCHING, reason="this transformers is too old for it")
def test_all_of_batching_is_there() -> None:
    assert broken(BATCHING + PIPELINE_BATCHING) == []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.path)
def test_each_row_is_used(row: Row) -> None:
    last = row.name.rpartition(".")[2]
    assert any(re.search(rf"\b{last}\b", source) for source in SOURCES.values())


def test_each_import_has_a_row() -> None:
    """Everything that is imported from transformers, but for modules, which are only ways to names."""
    rows = {row.name.partition(".")[0] for row in ROWS}
    for path, source in SOURCES.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers":
                assert {alias.name for alias in node.names} - MODULES <= rows, path.name


def lose(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the name of a row away."""
    holder, last = owner(row)
    for base in [holder, *getattr(holder, "__mro__", type(holder).__mro__)]:
        if last in vars(base) and base is not object:
            monkeypatch.delattr(base, last)


@pytest.mark.parametrize("row", CONTRACT, ids=lambda row: row.path)
def test_what_is_lost_is_named(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    lose(row, monkeypatch)
    with pytest.raises(UnsupportedVersionError, match=re.escape(row.path)) as refused:
        check_version()
    assert f"transformers=={NEWEST_TESTED}.*" in str(refused.value)


@pytest.mark.skipif(BEFORE_BATCHING, reason="this transformers is too old for it")
@pytest.mark.parametrize("row", BATCHING, ids=lambda row: row.path)
def test_what_batching_lost_is_named_when_it_is_asked_for(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    lose(row, monkeypatch)
    check_version()  # the package works without
    with pytest.raises(UnsupportedVersionError, match=re.escape(row.path)):
        require_support()


@pytest.mark.parametrize("row", PIPELINE, ids=lambda row: row.path)
def test_what_pipelines_lost_is_named(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    lose(row, monkeypatch)
    check_version()  # the package works without
    with pytest.raises(UnsupportedVersionError, match=rf"{re.escape(row.path)}.*use generate\(\)"):
        require(PIPELINE, "a pipeline")


def test_a_parameter_that_is_lost_is_named() -> None:
    assert broken((Row("transformers", "Cache.update", ("layer_idx", "no_such_argument")),)) == [
        "transformers.Cache.update without no_such_argument"
    ]


def test_alternatives() -> None:
    assert broken((Row("transformers", "Cache.update", ("no_such_argument|layer_idx",)),)) == []


@pytest.mark.parametrize("installed", ["5.16.9", "4.57.6", "5.16.0.dev0"])
def test_too_old_is_refused(installed: str) -> None:
    with pytest.raises(UnsupportedVersionError, match=rf"5\.17 or newer, found {installed}; run: pip") as caught:
        check_version(installed)
    assert isinstance(caught.value, ImportError)


@pytest.mark.parametrize("installed", ["5.17.0", "5.20.2", "5.20.0rc1", f"{NEWEST_TESTED}.0", f"{NEWEST_TESTED}.3"])
def test_tested_versions_say_nothing(installed: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_version(installed)


def in_faked_version(script: str) -> list[str]:
    """Lines that ``script`` prints in a process of its own in which transformers says that it is 5.99."""
    fake = """
        import importlib.metadata, warnings
        original = importlib.metadata.version
        importlib.metadata.version = lambda name: "5.99.0" if name == "transformers" else original(name)
    """
    code = textwrap.dedent(fake) + textwrap.dedent(script)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=sys.prefix)
    return run.stdout.splitlines()


def test_newer_than_tested_imports_with_one_warning() -> None:
    lines = in_faked_version("""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import kvquant_hf
        ours = [w for w in caught if issubclass(w.category, kvquant_hf.errors.KVQuantWarning)]
        print(*[type(w.message).__name__ for w in ours])
        print(ours[0].message)
    """)
    assert lines[0] == KVQuantVersionWarning.__name__
    assert "5.99.0" in lines[1]


def test_newer_with_a_hook_lost_does_not_import() -> None:
    lines = in_faked_version("""
        from transformers.generation import GenerationMixin
        del GenerationMixin._prepare_cache_for_generation
        try:
            import kvquant_hf
        except ImportError as error:
            print(type(error).__name__)
            print(error)
    """)
    assert lines[0] == "UnsupportedVersionError"
    assert "GenerationMixin._prepare_cache_for_generation" in lines[1]
    assert f"pip install 'transformers=={NEWEST_TESTED}.*'" in lines[1]
