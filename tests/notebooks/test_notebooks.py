"""Every notebook runs from top to bottom, and is committed with the outputs of such a run."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from kvquant_hf.triton_kernels.cpu.build import load

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def kinds(cell: nbformat.NotebookNode) -> set[str]:
    """What a cell has shown: names of streams, MIME types, errors."""
    shown = set()
    for output in cell.outputs:
        shown |= {output.name} if output.output_type == "stream" else set(output.get("data", {output.output_type: ""}))
    return shown


def test_there_are_some() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]


# What is read and written less of, so that the run takes half a minute; as they stand they run under ``-m full``.
SHORTER = {
    "01": {
        "max_new_tokens=24": "max_new_tokens=3",
        "max_new_tokens=10": "max_new_tokens=3",
        'topics["with"]': 'topics["with"][:900]',
    },
    "02": {},
    "03": {"context=384, count=2": "context=128, count=2", "for policy in policies]": "for policy in policies[::3]]"},
    "04": {"512, 2048, 8000": "512, 1024", "rounds=16": "rounds=3", "draw_requests(12": "draw_requests(4"},
    "05": {"context=320": "context=128", "max_new_tokens=24": "max_new_tokens=8"},
    "06": {"range(12)": "range(3)", "int4,kv2.4,int4-token": "kv2.4"},
}


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("shorter", [True, pytest.param(False, marks=pytest.mark.full)], ids=["shorter", "whole"])
@notebooks
def test_runs_from_top_to_bottom(path: Path, shorter: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # as for a reader, not as for the tests of kernels
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")  # tqdm misses Jupyter's widgets here
    load()  # the first on a machine to need the CPU kernels says that it compiles them, on stderr
    notebook = nbformat.read(path, as_version=4)
    for long, short in SHORTER[path.stem[:2]].items() if shorter else ():
        assert any(long in cell.source for cell in notebook.cells), long
        for cell in notebook.cells:
            cell.source = cell.source.replace(long, short)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}})
    client.execute()  # raises CellExecutionError where a cell does
    committed = code_cells(path)
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [kinds(cell) for cell in ran] == [kinds(cell) for cell in committed]


@notebooks
def test_is_committed_with_outputs(path: Path) -> None:
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    shown = set().union(*map(kinds, cells))
    assert shown - {"stdout"} and not shown & {"stderr", "error"}
    assert "site-packages" not in path.read_text()


@notebooks
def test_readme_has_a_line(path: Path) -> None:
    lines = (FOLDER / "README.md").read_text().splitlines()
    assert sum(f"[{path.name}]({path.name})" in line for line in lines) == 1


@notebooks
def test_is_plain_json(path: Path) -> None:
    """No widget states, no cell metadata: a change in a notebook is readable as text."""
    content = json.loads(path.read_text())
    assert set(content["metadata"]) == {"kernelspec", "language_info"}
    assert not any(cell["metadata"] for cell in content["cells"])
