"""What a run was measured on: constant columns of its results, and the clocks of the moment."""

import datetime
import re
import shutil
import subprocess
from importlib import metadata

import torch

from kvquant_hf.triton_kernels.target import architecture

from .importable import ROOT

CONSTANTS = (
    "date",
    "commit",
    "gpu",
    "architecture",
    "driver",
    "sm_clock_max_mhz",
    "memory_clock_max_mhz",
    "cuda",
    "torch",
    "triton",
    "transformers",
)


class NoGpuError(RuntimeError):
    """There is no GPU to measure."""


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
    answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
    values = [value.strip() for value in answer.stdout.strip().split(",")]
    return values if answer.returncode == 0 and len(values) == len(fields) else [""] * len(fields)


def clocks() -> dict[str, str]:
    """Clocks in MHz and degrees Celsius right now."""
    return dict(
        zip(
            ("sm_clock_mhz", "memory_clock_mhz", "temperature_c"),
            _ask("clocks.sm", "clocks.mem", "temperature.gpu"),
            strict=True,
        )
    )


def commit() -> str:
    """The checkout's commit, with "+changes" if files differ from it; "unknown" outside of a git checkout."""
    if shutil.which("git") is None:
        return "unknown"
    head, changes = (
        subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
        for arguments in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
    )
    if head.returncode:
        return "unknown"
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def describe(device: torch.device, named: str = "") -> dict[str, str]:
    """The constant columns; ``named`` replaces what git says of the commit."""
    driver, sm_clock, memory_clock = _ask("driver_version", "clocks.max.sm", "clocks.max.mem")
    values = {
        "date": datetime.date.today().isoformat(),
        "commit": named or commit(),
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
    return {name: values[name] for name in CONSTANTS}


def slug(name: str) -> str:
    """A device name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
