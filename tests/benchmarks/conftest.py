"""``benchmarks/gpu`` is a package of scripts that nobody installs; its tests import it as ``gpu``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
