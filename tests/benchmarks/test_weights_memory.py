"""``benchmarks/weights_memory.py`` on a tiny file: its cells, going on with a file that it finds, and its tables."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from gguf_files import save_gguf

pytest.importorskip("gguf", reason="gguf is not installed")

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "weights_memory.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with numbers small enough for a test."""
    spec = importlib.util.spec_from_file_location("weights_memory", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    small = {"CACHES": ("dynamic", "exact", "int4"), "BATCHES": (1, 2), "CONTEXT": 128, "PIECE": 64, "NEW_TOKENS": 2}
    small |= {"WINDOWS": 1, "PROMPTS": 2, "PROMPT_TOKENS": 70, "GENERATED": 3}
    for name, value in small.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_measuring(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = str(save_gguf(tmp_path / "tiny.gguf")), tmp_path / "out.csv"

    def run(*arguments: str) -> str:
        common = ("--out", str(out), "--name", "tiny", "--model", file, "--gguf", file)
        monkeypatch.setattr(sys, "argv", ["weights_memory.py", *common, *arguments])
        script.main()
        return capsys.readouterr().out

    run("--weights", "gguf,bnb", "--batches", "1,2")
    rows = script.read_rows(out)
    packed = {(row["cache"], row["batch"]): row for row in rows if row["weights"] == "gguf"}
    assert set(packed) == {(c, b) for c in ("dynamic", "int4") for b in ("", "1", "2")} | {("exact", "")}
    assert {row["status"] for row in packed.values()} == {"ok"}, rows
    assert float(packed["exact", ""]["top1_agreement"]) > float(packed["int4", ""]["kld_mean"]) > 0
    for cache in ("dynamic", "int4"):
        held = [int(packed[cache, batch]["kv_bytes"]) for batch in ("1", "2")]
        assert 1.8 < held[1] / held[0] <= 2
        assert int(packed[cache, "1"]["peak_bytes"]) > int(packed[cache, "1"]["empty_bytes"]) / 2
    assert int(packed["int4", "2"]["kv_bytes"]) < int(packed["dynamic", "2"]["kv_bytes"])
    # What cannot be loaded has a row with the reason for each cell.
    failed = [row for row in rows if row["weights"] == "bnb"]
    assert len(failed) == len(packed) and all(row["status"] == "failed" and row["reason"] for row in failed)

    run("--weights", "gguf", "--batches", "1,2")
    assert script.read_rows(out) == rows, "what is there is not measured again"
    table = run("--markdown")
    assert table.count("| `gguf` |") == 2 and "`bnb`" not in table and "Rounding alone" in table
