"""The range of transformers that is tested, checked before anything is imported from it."""

import sys
from importlib.metadata import version
from pathlib import Path

from packaging.specifiers import SpecifierSet

from .errors import UnsupportedVersionError

SUPPORTED_TRANSFORMERS = SpecifierSet(">=5.17,<5.24")


def check_version(installed: str | None = None) -> None:
    """Raise ``UnsupportedVersionError`` unless transformers is inside the tested range.

    Args:
        installed: the version to judge; default: the one that is installed.
    """
    installed = installed or version("transformers")
    if not SUPPORTED_TRANSFORMERS.contains(installed, prereleases=True):
        raise UnsupportedVersionError(
            f"kvquant_hf works with transformers {SUPPORTED_TRANSFORMERS}, found {installed}; "
            f"run: pip install 'transformers{SUPPORTED_TRANSFORMERS}'"
        )


def check_version_on_import() -> None:
    """:func:`check_version`; inside the command ``kvquant``, whose own code cannot run yet, say it and exit."""
    try:
        check_version()
    except UnsupportedVersionError as error:
        if Path(sys.argv[0]).stem == "kvquant":
            sys.exit(f"kvquant: {error}")
        raise
