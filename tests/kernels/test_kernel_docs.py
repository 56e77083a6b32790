"""The counts in docs/kernels.md are those of the kernels as they are, and its prose keeps to them."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def kernel_docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernel_docs", ROOT / "benchmarks" / "kernel_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def section(name: str) -> list[list[str]]:
    """Cells of the table between the markers ``name``, header first."""
    body = re.search(rf"<!-- begin:{name} -->(.*?)<!-- end:{name} -->", TEXT, re.DOTALL)[1]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body.split("\n") if line.startswith("| ")]


@pytest.mark.slow
def test_int4_counts_are_reproduced(kernel_docs: ModuleType) -> None:
    if kernel_docs.versions() not in TEXT:
        pytest.skip(f"the document was counted with another compiler than {kernel_docs.versions()}")
    header, *rows = section("loops")
    column = header.index("int4")
    counted = kernel_docs.sm_90_loops(["int4"])["int4"]
    assert [row[column] for row in rows] == kernel_docs.loop_rows("int4", counted.kernel, counted.loop), (
        "run: make docs"
    )


def test_bytes_follow_from_the_planes(kernel_docs: ModuleType) -> None:
    """The megabytes of the count: pages x bytes of a page, plus at most 5 MB of accumulators."""
    header, *rows = section("floors")
    pages = kernel_docs.BATCH * kernel_docs.HEADS * kernel_docs.TOKENS // kernel_docs.PAGE
    for row in rows:
        stored = pages * kernel_docs.page_bytes(row[0]) / 1e6
        assert stored <= float(row[header.index("MB")]) <= stored + 5 + 0.5, row[0]  # whole megabytes


def test_on_paper_the_policies_are_close_to_memory(kernel_docs: ModuleType) -> None:
    """The estimate of the whole step over stored bytes at the bandwidth of a copy, in the document as it is."""
    header, *rows = section("estimates")
    assert kernel_docs.COPY == 3.0e12 and kernel_docs.PROCESSORS == 132
    ratios = {row[0]: float(row[header.index("over memory")].strip("*")) for row in rows}
    assert ratios["int4"] <= 1.15 and ratios["turboquant"] <= 1.25


def test_every_table_is_filled(kernel_docs: ModuleType) -> None:
    names = {"versions", "resources", "shapes", "loops", "floors", "estimates", "chunks"}
    assert set(re.findall(r"<!-- begin:(\w+) -->", TEXT)) == names
    for name in ("resources", "shapes", "loops", "floors", "estimates", "chunks"):
        assert len(section(name)) > 5
    assert "Not yet measured on a GPU" in TEXT
    assert {row[0].strip("`") for row in section("resources")[1:]} == set(kernel_docs.TARGETS)
