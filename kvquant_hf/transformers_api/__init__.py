"""Everything that depends on transformers' own signatures.  Tested range: 5.17 to 5.23.

When transformers changes, this is the folder to change: ``layers.py`` (the methods of a cache layer), ``attention.py``
(the attention function), ``generate.py`` (names and functions that are extended), ``observe.py`` (a cache that shows
what a model stores).
"""

from .generate import install, uninstall
from .layers import (
    QuantizedPagedLayer,
    QuantizedSlidingLayer,
    build_layers,
    check_crop,
    check_rollback,
    fingerprint,
)
from .observe import ObservingCache

__all__ = [
    "ObservingCache",
    "QuantizedPagedLayer",
    "QuantizedSlidingLayer",
    "build_layers",
    "check_crop",
    "check_rollback",
    "fingerprint",
    "install",
    "uninstall",
]
