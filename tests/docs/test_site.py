"""The site: what docs/hooks.py makes of pages, and that it shows them as a repository browser does."""

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import kvquant_hf
from kvquant_hf import errors

pytest.importorskip("mkdocs")
MarkdownIt = pytest.importorskip("markdown_it").MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
COUNTED = ("h2", "h3", "li", "table", "tr", "pre", "img", "strong")


def load_hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = load_hooks()
PAGES = [
    *(path for path in HOOKS.PLACES if path.endswith(".md")),
    *(str(path.relative_to(ROOT)) for path in sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("notebooks/*.ipynb")])),
    "notebooks/README.md",
    "benchmarks/README.md",
    "benchmarks/lm_eval/README.md",
]
PAGES.remove("docs/api.md")  # made of docstrings


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make site` builds it: a page that is not in the navigation, or a broken link, is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def article(site: Path, path: str) -> str:
    """A page of the site without what is around it."""
    place = Path(HOOKS.place(path)).with_suffix(".html")
    html = (site / (place.with_name("index.html") if place.stem == "README" else place)).read_text(encoding="utf-8")
    return html[html.index("<article") : html.index("</article>")]


@pytest.mark.parametrize("path", PAGES)
def test_a_page_is_read_as_a_repository_browser_reads_it(site: Path, path: str) -> None:
    """As many lists, tables and so on as by CommonMark: the site's Markdown wants more blank lines and indentation."""
    text = re.sub(r"^\[\^\d+\]:.*\n", "", HOOKS.read_page(path)[0], flags=re.MULTILINE)  # footnotes become a list
    expected, html = MarkdownIt("commonmark").enable("table").render(text), article(site, path)
    html = re.sub(r'<div class="footnote">.*?</div>', "", html, flags=re.DOTALL)
    count = {tag: (len(re.findall(f"<{tag}[ >]", expected)), len(re.findall(f"<{tag}[ >]", html))) for tag in COUNTED}
    assert all(ours == theirs for ours, theirs in count.values()), count


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        html = page.read_text(encoding="utf-8")
        for tag in re.findall(r"<(?:link|script|img|iframe|source)\b[^>]*>", html):
            assert not re.search(r'(?:src|href)="?(?:https?:)?//', tag), (page.name, tag)
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(?:https?:)?//|@import", sheet.read_text(encoding="utf-8")), sheet.name


def test_files_that_pages_link_to_are_there(site: Path) -> None:
    for name in ("benchmarks/results/accuracy-wikitext2.csv", "LICENSE"):
        assert (site / name).read_bytes() == (ROOT / name).read_bytes()
    assert not list(site.rglob("*.py"))


def test_the_reference_has_what_a_program_imports(site: Path) -> None:
    shown = set(re.findall(r'id="kvquant_hf\.(?:[a-z_.]+\.)?(\w+)"', article(site, "docs/api.md")))
    usual = {name for name in kvquant_hf.__all__ if not name.endswith("PagedCache")} - {"POLICIES"}
    assert {"QuantizedPagedCache", *usual} <= shown
    assert {name for name, value in vars(errors).items() if inspect.isclass(value)} <= shown


def test_links() -> None:
    text = (
        "[a](docs/serving.md#pipelines) [b](notebooks/05_new_codec.ipynb) [c](https://x.org/y.md) [d](no.md) [e](#f)\n"
    )
    assert HOOKS.relink(text, "README.md") == (
        "[a](serving.md#pipelines) [b](notebooks/05_new_codec.md) [c](https://x.org/y.md) [d](no.md) [e](#f)\n"
    )
    assert HOOKS.relink("[a](../README.md#policies)", "docs/choose.md") == "[a](index.md#policies)"
    assert HOOKS.relink("[a](../CONTRIBUTING.md)", "notebooks/x.ipynb") == "[a](../contributing.md)"
    code = "```\n[a](docs/serving.md)\n```\n"
    assert HOOKS.relink(code, "README.md") == code and not list(HOOKS.targets(code, "README.md"))
    assert list(HOOKS.targets(text, "README.md")) == ["docs/serving.md", "notebooks/05_new_codec.ipynb"]


def test_notebooks_become_pages() -> None:
    shown = [
        {"output_type": "stream", "name": "stdout", "text": ["one\n", "two\n"]},
        {"output_type": "execute_result", "data": {"text/markdown": ["|a|"], "text/plain": "x"}},
        {"output_type": "execute_result", "data": {"text/html": ["<b>"], "text/plain": ["plain"]}},
        {"output_type": "display_data", "data": {"image/png": "QUJD", "text/plain": "figure"}},
    ]
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {"cell_type": "code", "source": ["print(1)"], "outputs": shown},
    ]
    page, pictures = HOOKS.notebook_page({"cells": cells}, "name")
    assert page == (
        "# Title\ntext\n\n```python\nprint(1)\n```\n\n```text\none\ntwo\n```\n\n|a|\n\n```text\nplain\n```\n\n"
        "![what the cell above draws](name-1.png)\n"
    )
    assert pictures == {"name-1.png": b"ABC"}
