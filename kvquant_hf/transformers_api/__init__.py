"""Everything that depends on transformers' own signatures.  Tested range: 5.17 to 5.23.

When transformers changes, this is the folder to change: ``layers.py`` (the methods of a cache layer), ``attention.py``
(the attention function), ``generate.py`` (names and functions that are extended).
"""

from .generate import install, uninstall
from .layers import QuantizedPagedLayer, build_layers, fingerprint

__all__ = ["QuantizedPagedLayer", "build_layers", "fingerprint", "install", "uninstall"]
