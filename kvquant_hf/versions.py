"""Which versions of transformers work, checked before anything else is imported from it.

A version older than the range is refused.  One that is newer than what was tested is taken, with one warning, if all
that we rely on is there (``transformers_api/contract.py``): minor versions appear every ten days, and most change
nothing here.
"""

import sys
import warnings
from importlib.metadata import version
from pathlib import Path

from packaging.version import Version

from .errors import KVQuantVersionWarning, UnsupportedVersionError
from .transformers_api.contract import broken

OLDEST, NEWEST_TESTED = "5.17", "5.24"


def check_version(installed: str | None = None) -> None:
    """Refuse a transformers that cannot work, and say it if it is newer than what was tested.

    Args:
        installed: the version to judge; default: the one that is installed.

    Raises:
        UnsupportedVersionError: too old, or something that we rely on is not there.
    """
    found = Version(installed or version("transformers"))
    if found.release[:2] < Version(OLDEST).release:
        raise UnsupportedVersionError(
            f"kvquant_hf works with transformers {OLDEST} or newer, found {found}; "
            f"run: pip install 'transformers>={OLDEST}'"
        )
    if lost := broken():
        raise UnsupportedVersionError(
            f"transformers {found} has no {'; no '.join(lost)}, which kvquant_hf relies on; the newest version that "
            f"works is {NEWEST_TESTED}, run: pip install 'transformers=={NEWEST_TESTED}.*'"
        )
    if found.release[:2] > Version(NEWEST_TESTED).release:
        warnings.warn(
            f"transformers {found} is newer than {NEWEST_TESTED}, the newest that kvquant_hf {version('kvquant-hf')} "
            "was tested with; all that it relies on is there.",
            KVQuantVersionWarning,
            stacklevel=2,
        )


def check_version_on_import() -> None:
    """:func:`check_version`; inside the command ``kvquant``, whose own code cannot run yet, say it and exit."""
    try:
        check_version()
    except UnsupportedVersionError as error:
        if Path(sys.argv[0]).stem == "kvquant":
            sys.exit(f"kvquant: {error}")
        raise
