"""The arrows of DESIGN.md and the size of files, checked from the sources alone: nothing is imported to look at it."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kvquant_hf import versions
from kvquant_hf.batching import hooks

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"kvquant_hf": "kvquant_hf", "triton_kernels": "kvquant_hf.triton_kernels"}  # folder: installed name
STDLIB = tuple(sys.stdlib_module_names)
CODEC_TYPES = tuple(f"kvquant_hf.triton_kernels.codecs{base}.{t}" for base in ("", ".base") for t in ("Codec", "Plane"))


class Rule(NamedTuple):
    """``modules`` (patterns of installed names) but not ``exempt`` may not import ``banned``, save what is ``allowed``.

    An import is named in full, down to the imported name; a prefix stands for all that is below it, "" for everything.
    """

    modules: tuple[str, ...]
    banned: tuple[str, ...]
    allowed: tuple[str, ...] = ()
    exempt: tuple[str, ...] = ()


RULES = {
    "the bare name triton_kernels is somebody else's package": Rule(("*",), banned=("triton_kernels",)),
    "codecs know tensors, the rotation and the arithmetic of tiles, nothing else": Rule(
        ("kvquant_hf.triton_kernels.codecs", "kvquant_hf.triton_kernels.codecs.*"),
        banned=("",),
        allowed=(
            "torch",
            "numpy",
            "kvquant_hf.triton_kernels.codecs",
            *(
                f"kvquant_hf.triton_kernels.{name}"
                for name in ("hadamard", "target", "tile_math", "unpack", "pack", "ptx")
            ),
            *STDLIB,
        ),
    ),
    "kernels know tensors and pages, not models": Rule(
        ("kvquant_hf.triton_kernels", "kvquant_hf.triton_kernels.*"),
        banned=("kvquant_hf", "transformers"),
        allowed=("kvquant_hf.triton_kernels", "kvquant_hf.errors"),
    ),
    "pages and stores do not pick codecs by name": Rule(
        ("kvquant_hf.pages", "kvquant_hf.pages.*"),
        banned=("kvquant_hf.triton_kernels.codecs", "kvquant_hf.policies"),
        allowed=CODEC_TYPES,
        exempt=("kvquant_hf.pages.static_ops",),  # an operator of torch takes a codec by its name
    ),
    "transformers stays behind its doors": Rule(
        ("kvquant_hf", "kvquant_hf.*"),
        banned=("transformers",),
        exempt=(
            "kvquant_hf.transformers_api",
            "kvquant_hf.transformers_api.*",
            "kvquant_hf.batching.*",  # parts of transformers' own machine, extended
            "kvquant_hf.serving.*",  # and of its server
            "kvquant_hf.cache",
            "kvquant_hf.pipelines",
            "kvquant_hf.presets",
            "kvquant_hf.versions",
            "kvquant_hf.cli",
            "kvquant_hf.cli.*",
            "kvquant_hf.weights.load",  # transformers makes the model
            "kvquant_hf.clients.chat",  # it is transformers' own chat client
            "kvquant_hf.evaluation.baselines",  # transformers' own quantized caches are what it is about
            "kvquant_hf.evaluation.lm_eval_model",  # a GGUF file needs transformers' settings
            "kvquant_hf.benchmark.contenders",  # and here
            "kvquant_hf.benchmark.shapes",  # models of transformers' classes, made from numbers
            "kvquant_hf.benchmark.subject",
        ),
    ),
    "lm-eval is needed by two commands, its model and what compares with it": Rule(
        ("kvquant_hf", "kvquant_hf.*"),
        banned=("lm_eval", "kvquant_hf.evaluation.lm_eval_model", "kvquant_hf.evaluation.compare"),
        exempt=(
            "kvquant_hf.cli.compare",
            "kvquant_hf.cli.lm_eval",
            "kvquant_hf.evaluation.compare",
            "kvquant_hf.evaluation.lm_eval_model",
        ),
    ),
}

# The rooms of the house, top to bottom: an import goes down, or stays in its room.  The root is a room for each of its
# modules; ``errors`` is the ground that all stand on.
ORDER = (
    ("cli",),
    ("clients",),
    ("benchmark",),
    ("serving",),
    ("calibration",),
    ("evaluation",),
    ("__init__",),
    ("pipelines",),
    ("batching",),
    ("versions", "presets"),
    ("cache",),
    ("weights",),
    ("pools",),
    ("options", "transformers_api", "files"),
    ("layers",),
    ("reports",),
    ("pages",),
    ("policies",),
    ("triton_kernels",),
    ("errors",),
)
MAX_ROOT_MODULES = 8
CONSTRAINTS = ("constraints-min.txt", "constraints-mid.txt", "constraints-batching.txt", "constraints.txt")
MAX_LINES, MAX_LINES_KERNEL = 300, 600

SOURCES = sorted(path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py"))
OTHERS = sorted(path for folder in ("tests", "benchmarks", "docs") for path in (ROOT / folder).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    """The name under which a file is imported once installed; files outside of the packages keep their path's."""
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    if rest and rest[-1] == "__init__":
        rest.pop()
    return ".".join([PACKAGES.get(folder, folder), *rest])


def imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that is imported anywhere in a module, relative imports resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node.lineno, first.value


def below(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(prefix == "" or name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def violations(source: str, module: str, package: str) -> list[str]:
    """``line: import (rule)`` for each import that a rule forbids to ``module``."""
    found = []
    names = list(imports(ast.parse(source), package))
    for title, rule in RULES.items():
        if not any(fnmatchcase(module, m) for m in rule.modules) or any(fnmatchcase(module, m) for m in rule.exempt):
            continue
        found += [
            f"{n}: {name} ({title})" for n, name in names if below(name, rule.banned) and not below(name, rule.allowed)
        ]
    return found


@pytest.mark.parametrize("path", SOURCES + OTHERS, ids=relative)
def test_import_directions(path: Path) -> None:
    module = module_name(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    assert violations(path.read_text(encoding="utf-8"), module, package) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kvquant_hf.policies.table", "import triton_kernels"),
        ("tests.test_x", "from triton_kernels.codecs import CODECS"),
        ("kvquant_hf.triton_kernels.codecs.fp8", "import triton"),
        ("kvquant_hf.triton_kernels.codecs.fp8", "from ..reference import gather_dense"),
        ("kvquant_hf.triton_kernels.reference", "from ..policies.table import KVPolicy"),
        ("kvquant_hf.triton_kernels.reference", "import transformers.cache_utils"),
        ("kvquant_hf.pages.store", "from ..triton_kernels.codecs import CODECS"),
        ("kvquant_hf.pages.pool", "def f():\n    from transformers import Cache"),
        ("kvquant_hf.layers.attention", "import importlib\nimportlib.import_module('transformers')"),
        ("kvquant_hf.evaluation.text", "from .lm_eval_model import KVQuantLM"),
        ("kvquant_hf.evaluation.paired", "from .compare import tabulate"),
        ("kvquant_hf.benchmark.speed.race", "from transformers import DynamicCache"),
    ],
)
def test_the_checker_refuses(module: str, source: str) -> None:
    assert violations(source, module, module.rpartition(".")[0])


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "kvquant_hf.triton_kernels.codecs.fp8",
            "import math, torch\nfrom ..hadamard import hadamard\nfrom .base import Codec",
        ),
        ("kvquant_hf.triton_kernels.reference", "import triton\nfrom .codecs import CODECS"),
        ("kvquant_hf.pages.store", "from ..triton_kernels.codecs import Codec"),
        ("kvquant_hf.cache", "from transformers import Cache"),
        ("kvquant_hf.cli.demo", "import transformers\nfrom ..policies.cost import f\nfrom . import tables"),
        ("tests.test_x", "import transformers\nfrom kvquant_hf.triton_kernels.codecs import CODECS"),
    ],
)
def test_the_checker_accepts(module: str, source: str) -> None:
    assert violations(source, module, module.rpartition(".")[0]) == []


def graph(sources: dict[str, tuple[str, str]]) -> dict[str, set[str]]:
    """For each module the modules that it imports: for the types alone and inside of functions too.

    Args:
        sources: package and text of each module, by its installed name.
    """
    edges: dict[str, set[str]] = {}
    for module, (package, source) in sources.items():
        edges[module] = set()
        for _, name in imports(ast.parse(source), package):
            target = name if name in sources else name.rpartition(".")[0]
            if target in sources and target != module:
                edges[module].add(target)
    return edges


def circles(edges: dict[str, set[str]]) -> list[set[str]]:
    """Groups of modules that all need each other."""
    above = {module: {module} for module in edges}  # what is reached from a module
    for module in edges:
        waiting = [module]
        while waiting:
            new = edges[waiting.pop()] - above[module]
            above[module] |= new
            waiting += new
    needs = {module: frozenset(m for m in found if module in above[m]) for module, found in above.items()}
    return [set(group) for group in set(needs.values()) if len(group) > 1]


def room(module: str) -> str:
    """The room of a module: its wing, or a module of the root itself."""
    return [*module.split("."), "__init__"][1]


def upward(edges: dict[str, set[str]]) -> list[str]:
    """Imports that go up, or to a neighbour on the same floor."""
    floor = {name: i for i, names in enumerate(ORDER) for name in names}
    return [
        f"{module} -> {target}"
        for module, targets in edges.items()
        for target in targets
        # Every module may ask which version of the package it is.
        if room(target) not in (room(module), "__init__") and floor[room(target)] <= floor[room(module)]
    ]


@pytest.fixture(scope="module")
def edges() -> dict[str, set[str]]:
    sources = {}
    for path in SOURCES:
        module = module_name(path)
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        sources[module] = package, path.read_text(encoding="utf-8")
    return graph(sources)


def test_no_circle(edges: dict[str, set[str]]) -> None:
    assert circles(edges) == []


def test_every_arrow_goes_down(edges: dict[str, set[str]]) -> None:
    assert upward(edges) == []


def test_the_root_is_what_a_user_meets() -> None:
    assert len(list((ROOT / "kvquant_hf").glob("*.py"))) <= MAX_ROOT_MODULES


def test_circles_and_arrows_are_seen() -> None:
    """For the types alone, inside of a function, and around three corners."""
    sources = {
        "kvquant_hf.layers.a": (
            "kvquant_hf.layers",
            "if TYPE_CHECKING:\n    from ..pages.b import B",
        ),
        "kvquant_hf.pages.b": ("kvquant_hf.pages", "def f():\n    from . import c"),
        "kvquant_hf.pages.c": ("kvquant_hf.pages", "import kvquant_hf.layers.a"),
        "kvquant_hf.pages.d": ("kvquant_hf.pages", "from ..pages import b\nimport os"),
        "kvquant_hf.pages": ("kvquant_hf.pages", ""),
    }
    assert circles(graph(sources)) == [{"kvquant_hf.layers.a", "kvquant_hf.pages.b", "kvquant_hf.pages.c"}]
    assert upward(graph(sources)) == ["kvquant_hf.pages.c -> kvquant_hf.layers.a"]


@pytest.mark.parametrize("path", sorted((ROOT / "kvquant_hf/pages").glob("*.py")), ids=relative)
def test_no_codec_is_named(path: Path) -> None:
    from kvquant_hf.triton_kernels.codecs import CODECS

    tree = ast.parse(path.read_text(encoding="utf-8"))
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert strings.isdisjoint(CODECS)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_a_file_can_be_read_standing_up(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), "a module opens with what it does"
    assert text.count("\n") <= (MAX_LINES_KERNEL if "@triton.jit" in text else MAX_LINES), "split it"


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_is_installed(pyproject: dict[str, Any]) -> None:
    """A folder that pyproject.toml does not list works in an editable install and is missing in the wheel."""
    assert {module_name(path.parent / "__init__.py") for path in SOURCES} <= set(
        pyproject["tool"]["setuptools"]["packages"]
    )


def test_every_file_that_is_read_is_installed(pyproject: dict[str, Any]) -> None:
    """The same of files that are not Python: each is in its package's list."""
    patterns = pyproject["tool"]["setuptools"]["package-data"]
    files = (path for folder in PACKAGES for path in (ROOT / folder).rglob("*") if path.is_file())
    others = [path for path in files if path.suffix != ".py" and path.parent.name != "__pycache__"]
    assert others
    for path in others:
        listed = patterns.get(module_name(path.parent / "__init__.py"), ())
        assert any(fnmatchcase(path.name, pattern) for pattern in listed), path


def test_one_range_of_transformers(pyproject: dict[str, Any]) -> None:
    """What pip is told, what is checked at import, and what the constraint files pin are one range; it has no upper
    end, because a version newer than tested is judged at import."""
    (spec,) = (
        d.removeprefix("transformers") for d in pyproject["project"]["dependencies"] if d.startswith("transformers")
    )
    pins = [
        re.search(r"^transformers==(\d+\.\d+)", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)[1]
        for name in CONSTRAINTS
    ]
    assert spec == f">={versions.OLDEST}"
    assert (pins[0], pins[-2], pins[-1]) == (versions.OLDEST, hooks.OLDEST, versions.NEWEST_TESTED)
    assert sorted(pins, key=lambda pin: [*map(int, pin.split("."))]) == pins


def test_the_bare_name_is_not_ours() -> None:
    """With the package installed and the working directory elsewhere, ``triton_kernels`` is not our folder."""
    code = "import importlib.util as u; s = u.find_spec('triton_kernels'); print(s and s.submodule_search_locations)"
    # -E: a PYTHONPATH that names the repository would say nothing about the installation.
    found = subprocess.run(
        [sys.executable, "-E", "-c", code], cwd=Path(sys.prefix), capture_output=True, text=True, check=True
    ).stdout
    assert str(ROOT / "triton_kernels") not in found


def test_constraints_differ_in_transformers_alone() -> None:
    def pins(name: str) -> set[str]:
        lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
        return {line for line in lines if line and not line.startswith("transformers==")}

    assert all(pins(name) == pins("constraints.txt") for name in CONSTRAINTS)
