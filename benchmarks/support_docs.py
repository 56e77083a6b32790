"""Run every architecture and way of generating with several versions of transformers and write docs/support.md.

    make docs-support        or: python benchmarks/support_docs.py <a python> <another>

Each interpreter named runs the suite with its own transformers and writes build/support-<version>.json; the files are
then put together, oldest version first.  Some minutes each.
"""

import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The suite is shared with the tests, which are no package.
sys.path.insert(0, str(ROOT / "tests"))
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
os.environ.setdefault("TRITON_INTERPRET", "1")

from stand_ins import NAMES
from support.architectures import ARCHITECTURES
from support.outcomes import COLUMNS, evaluate
from support.table import DOCUMENT, HERE, document


def measure(folder: Path) -> None:
    """Write the outcomes with the installed transformers to ``folder``."""
    warnings.simplefilter("ignore")
    logging.disable()  # of requests that are refused
    cells = {}
    for name in ARCHITECTURES:
        outcomes = {column: evaluate(name, column) for column in [*COLUMNS, *NAMES]}
        cells[name] = {column: (outcome.text, outcome.reason) for column, outcome in outcomes.items()}
        print(f"{HERE} {name}: {' '.join(outcome.text for outcome in outcomes.values())}", flush=True)
        for column, outcome in outcomes.items():
            if outcome.text == "✗":
                print(f"    {column}: {outcome.reason} ({outcome.detail})")
    (folder / f"support-{HERE}.json").write_text(json.dumps({HERE: cells}, ensure_ascii=False, indent=1), "utf-8")


def main(interpreters: list[str]) -> None:
    """Run each interpreter and put together what they wrote."""
    folder = ROOT / "build"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("support-*.json"):
        old.unlink()
    for interpreter in interpreters:
        subprocess.run([interpreter, __file__, "--measure", str(folder)], check=True)
    versions = {}
    for path in sorted(folder.glob("support-*.json"), key=lambda path: [*map(int, path.stem.split("-")[1].split("."))]):
        for version, cells in json.loads(path.read_text("utf-8")).items():
            versions[version] = {
                name: {column: (text, reason) for column, (text, reason) in row.items()} for name, row in cells.items()
            }
    DOCUMENT.write_text(document(versions), "utf-8")
    print(f"wrote {DOCUMENT.relative_to(ROOT)} for transformers {', '.join(versions)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(Path(sys.argv[2]))
    else:
        main(sys.argv[1:])
