"""What a measurement runs on: free memory, the peak of this process, and a description for the record."""

import contextlib
import ctypes
import datetime
import gc
import os
import platform
import threading
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

_STATUS = Path("/proc/self/status")
_PACKAGES = ("torch", "transformers", "triton", "optimum-quanto", "hqq")
_SAMPLE_SECONDS = 0.002


def kilobytes(text: str, name: str) -> int | None:
    """Bytes of the line ``name:  1234 kB`` in a file of ``/proc``; None if there is no such line."""
    for line in text.splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def available_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on ``device`` now; None where the system does not say.

    On a CPU: what Linux calls available, or what is left to this process's control group if that is less.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        free = kilobytes(Path("/proc/meminfo").read_text(encoding="ascii"), "MemAvailable")
    except OSError:
        return None
    limits = [bytes_ for bytes_ in (free, _group_memory(Path("/sys/fs/cgroup"))) if bytes_ is not None]
    return min(limits, default=None)


def _group_memory(folder: Path) -> int | None:
    """Bytes left in a control group (version 2); None without a limit."""
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    cached = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    return None if limit == "max" else int(limit) - used + cached


class PeakWatch:
    """The largest resident memory of this process since the watch began, above what it was then.

    Linux keeps a high-water mark, which is set back at the beginning (``how`` is ``"high-water mark"``); where that is
    not allowed, a thread looks every two milliseconds (``"sampled"``).  Memory that the allocator holds without need
    is given back first, so that it cannot be used again unseen.

    Raises:
        OSError: not on Linux.
    """

    def __init__(self) -> None:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
        self.base = self._read("VmRSS")
        self.how = "high-water mark"
        self._highest = 0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            settled = self._read("VmHWM") <= self.base + (4 << 20)
        except OSError:
            settled = False
        if not settled:
            self.how = "sampled"
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()

    @staticmethod
    def _read(name: str) -> int:
        found = kilobytes(_STATUS.read_text(encoding="ascii"), name)
        if found is None:
            raise OSError(f"{_STATUS} has no {name}")
        return found

    def _sample(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            self._highest = max(self._highest, self._read("VmRSS"))

    def peak(self) -> int:
        """Bytes above the beginning, at the worst moment so far."""
        highest = self._read("VmHWM") if self._thread is None else max(self._highest, self._read("VmRSS"))
        return max(0, highest - self.base)

    def __enter__(self) -> "PeakWatch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe(device: torch.device) -> dict[str, Any]:
    """Machine, versions and date; nothing about who runs it or where."""
    from .. import __version__

    try:
        total = kilobytes(Path("/proc/meminfo").read_text(encoding="ascii"), "MemTotal")
    except OSError:
        total = None
    versions = {"kvquant_hf": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.date.today().isoformat(),
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_bytes": total,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        },
        "versions": versions,
    }


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
