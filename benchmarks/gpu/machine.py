"""What a run was measured on: constant columns of its results, and the clocks of the moment."""

import datetime
import hashlib
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from kvquant_hf.triton_kernels.target import architecture

from .importable import ROOT

CONSTANTS = (
    "date",
    "commit",
    "source",
    "gpu",
    "architecture",
    "driver",
    "sm_clock_max_mhz",
    "memory_clock_max_mhz",
    "cuda",
    "torch",
    "triton",
    "transformers",
    "policies",
    "gate",
)
# What has to be the same for one run to go on where another ended.
CONDITIONS = tuple(name for name in CONSTANTS if name not in ("date", "gate"))
_PATIENCE = 20.0  # seconds for nvidia-smi
# What the measured code consists of, and what says that it is right.
_SOURCE = ("kvquant_hf", "triton_kernels", "benchmarks/gpu", "tests/kernels")


class NoGpuError(RuntimeError):
    """There is no GPU to measure."""


class UnnamedError(RuntimeError):
    """Nobody says which commit is measured."""


def gpu() -> torch.device:
    """The GPU to measure.

    Raises:
        NoGpuError: there is none.
    """
    if not torch.cuda.is_available():
        raise NoGpuError("there is no GPU here; run this where torch.cuda.is_available() is true.")
    return torch.device("cuda", torch.cuda.current_device())


def _ask(*fields: str) -> list[str]:
    """Fields of ``nvidia-smi``; empty strings where there is none."""
    if shutil.which("nvidia-smi") is None:
        return [""] * len(fields)
    uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "-i", uuid]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        return [""] * len(fields)
    values = [value.strip() for value in answer.stdout.strip().split(",")]
    return values if len(values) == len(fields) else [""] * len(fields)


def clocks() -> dict[str, str]:
    """Clocks in MHz and degrees Celsius right now."""
    return dict(
        zip(
            ("sm_clock_mhz", "memory_clock_mhz", "temperature_c"),
            _ask("clocks.sm", "clocks.mem", "temperature.gpu"),
            strict=True,
        )
    )


def commit(named: str = "") -> str:
    """The checkout's commit, with "+changes" if files differ from it; or ``named``, if given: a copy need not be one.

    Raises:
        UnnamedError: neither says anything.
    """
    if named:
        return named
    if shutil.which("git") is not None:
        asked = (["rev-parse", "--short=12", "HEAD"], ["rev-parse", "--show-prefix"], ["status", "--porcelain", "-uno"])
        head, inside, changes = (
            subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True) for words in asked
        )
        # A copy inside of another checkout is not that checkout.
        if head.returncode == 0 and not inside.stdout.strip():
            return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")
    raise UnnamedError("git does not know this folder, so nothing says which code is measured; give --commit NAME.")


def source(root: Path = ROOT) -> str:
    """A digest of the files that are measured and of the tests of the gate: equal for equal code, whatever its name."""
    digest = hashlib.sha256()
    for folder in _SOURCE:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h"):
                digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def describe(device: torch.device, named: str = "") -> dict[str, str]:
    """The constant columns but those of the gate; ``named`` as in ``commit``, which says what is raised."""
    driver, sm_clock, memory_clock = _ask("driver_version", "clocks.max.sm", "clocks.max.mem")
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(named),
        "source": source(),
        "gpu": torch.cuda.get_device_name(device),
        "architecture": architecture(device),
        "driver": driver,
        "sm_clock_max_mhz": sm_clock,
        "memory_clock_max_mhz": memory_clock,
        "cuda": torch.version.cuda or torch.version.hip or "",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
    }


def slug(name: str) -> str:
    """A device name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
