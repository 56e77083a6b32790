"""``kvquant needle`` on a tiny model."""

import importlib.util
import json
from pathlib import Path

import pytest
from command import Run, is_one_sentence

FAST = ("--lengths", "200,260", "--depths", "0,100", "--page-size", "16")


def test_as_json(run: Run, tiny: Path) -> None:
    code, out, err = run("needle", "--model", tiny, "--policies", "int4,exact", *FAST, "--json")
    data = json.loads(out)
    assert (code, err) == (0, "")
    conditions = {"lengths": [200, 260], "depths": [0, 100], "page_size": 16, "dtype": "float32", "seed": 0}
    assert conditions.items() <= data.items()
    assert list(data["caches"]) == ["exact", "int4"]
    exact, int4 = (cache["cells"] for cache in data["caches"].values())
    assert [(cell["length"], cell["depth"]) for cell in exact] == [(200, 0), (200, 100), (260, 0), (260, 100)]
    for one, other in zip(exact, int4, strict=True):
        assert one["digits"] == other["digits"]
        assert one["nats"] != other["nats"] == pytest.approx(one["nats"], rel=0.1)
    for cache in data["caches"].values():
        assert cache["found"] == sum(cell["found"] for cell in cache["cells"])
        pairs = zip(cache["cells"], exact, strict=True)
        assert cache["equal_to_exact"] == sum(cell["found"] == other["found"] for cell, other in pairs)


def test_a_budget_is_named_with_what_it_chose(run: Run, tiny: Path) -> None:
    options = ("--lengths", "200", "--depths", "50", "--page-size", "16", "--json")
    code, out, _ = run("needle", "--model", tiny, "--policies", "auto:7.5", *options)
    assert code == 0 and list(json.loads(out)["caches"]) == ["exact", "auto:7.5 (int4)"]


def test_as_a_table_of_80_columns(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    picture = tmp_path / "map.svg"
    options = ("--policies", "int8,turboquant-qjl", "--batch", "2", "--png", picture)
    code, out, err = run("needle", "--model", tiny, *FAST, *options)
    assert code == 0
    rows = {line.split()[0]: line.split() for line in out.splitlines() if "/" in line}
    assert list(rows) == ["exact", "int8", "turboquant-qjl"]
    assert all(row[-2] == "4/4" for name, row in rows.items() if name == "exact")
    assert "Python language reference" in out and "measuring" in err
    assert picture.read_text(encoding="utf-8").startswith("<?xml")


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (("--policies", "int5"), "turboquant"),
        (("--lengths", "many"), "--lengths 512,1024"),
        (("--depths", ","), "--depths 0,50,100"),
        (("--depths", "120"), "percentage"),
        (("--lengths", "2000"), "--lengths 1024"),
        (("--lengths", "40"), "no haystack"),
        (("--text", "/no/such/file"), "No such file"),
        (("--page-size", "60"), "multiple of 8"),
        (("--png", "/no/such/folder/x.png"), "folder that exists"),
        (("--png", "x.gif"), ".png"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_input_is_one_sentence(run: Run, tiny: Path, args: tuple[str, ...], word: str) -> None:
    code, out, err = run("needle", "--model", tiny, "--json", *args)
    assert (code, out) == (2, "")
    assert is_one_sentence(err)
    assert word in err


def test_matplotlib_is_missing(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find_spec(name, *rest)
    )
    code, out, err = run("needle", "--model", tiny, "--png", "x.png")
    assert (code, out) == (1, "")
    assert is_one_sentence(err) and "--png" in err and "pip install matplotlib" in err
