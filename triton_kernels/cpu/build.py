"""Compile the kernels with the machine's C++ compiler, once, and load them.

The library lies in the user's cache folder under a name made of the sources, the compiler's version, the flags and the
processor's features.  It appears there complete (written beside and renamed), so that processes that compile at the
same time do not disturb each other.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from ...errors import ImplementationError

_FOLDER = Path(__file__).parent
_SOURCES = (
    "kernels.cpp",
    *("append.h", "attention.h", "blocks.h", "half.h", "octet.h", "ranked.h", "small_float.h", "threads.h", "tile.h"),
    "vector.h",
)
_COMPILERS = ("c++", "g++", "clang++")
# Without -ffast-math: stored bytes must be those of the codec in torch.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-pthread", "-w")
_SECONDS = 300.0

_log = logging.getLogger(__name__)


class BuildError(ImplementationError):
    """The kernels cannot be compiled or loaded here."""


def find_compiler() -> str:
    """Path of the C++ compiler: ``$CXX``, or the first of c++, g++ and clang++ that there is.

    Raises:
        BuildError: there is none.
    """
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else _COMPILERS:
        found = shutil.which(name)
        if found is not None:
            return found
    if wanted:
        raise BuildError(f"the C++ compiler that CXX names, {wanted!r}, was not found; set CXX to one that exists")
    raise BuildError(f"no C++ compiler was found ({', '.join(_COMPILERS)}); install one or set CXX")


def cache_folder() -> Path:
    """Where compiled kernels lie; not made yet."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kvquant_hf"


def _features() -> str:
    """The processor and what it can do, as far as the system says: -march=native depends on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    fields = ("model name", "flags", "Features", "CPU part", "isa")
    return "\n".join(sorted({line for line in lines if line.startswith(fields)}))


def _run(command: list[str]) -> str:
    """What ``command`` prints.

    Raises:
        BuildError: it fails, with its first line.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the C++ compiler {command[0]} could not be run ({error}); set CXX to another one") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()
        line = next((text for text in said if "error" in text), said[0]).strip()
        raise BuildError(f"compiling the CPU kernels with {command[0]} failed: {line}; set CXX to another compiler")
    return done.stdout


def build(flags: tuple[str, ...] = FLAGS) -> Path:
    """Path of the compiled library, compiled now if it was not before.

    Raises:
        BuildError: no compiler, or it fails, or the cache folder cannot be written.
    """
    compiler = find_compiler()
    digest = hashlib.sha256()
    for part in (*flags, compiler, _run([compiler, "--version"]), platform.machine(), _features()):
        digest.update(part.encode() + b"\0")
    for name in _SOURCES:
        digest.update((_FOLDER / name).read_bytes())
    library = cache_folder() / f"cpu-{digest.hexdigest()[:24]}.so"
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(".tmp", "cpu-", library.parent)
        os.close(handle)
    except OSError as error:
        raise BuildError(f"compiled CPU kernels cannot be kept ({error}); set XDG_CACHE_HOME to a folder") from error
    _log.warning("compiling the CPU kernels with %s, once for this machine, into %s", compiler, library.parent)
    try:
        _run([compiler, *flags, str(_FOLDER / _SOURCES[0]), "-o", name])
        os.replace(name, library)
    finally:
        Path(name).unlink(missing_ok=True)
    return library


@functools.cache
def load(flags: tuple[str, ...] = FLAGS) -> "ctypes.CDLL | BuildError":
    """The compiled library, or why there is none; found out once per process."""
    try:
        return ctypes.CDLL(str(build(flags)))
    except BuildError as error:
        return error
    except OSError as error:
        return BuildError(f"the compiled CPU kernels cannot be loaded ({error}); delete {cache_folder()}")
