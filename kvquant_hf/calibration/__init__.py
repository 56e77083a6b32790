"""Calibration beforehand: extremes of keys and values over a text, and the scales that policy ``int8-static`` uses.

``collect`` reads text through a model and keeps the smallest and largest element of every channel (``observe.py``);
``compute`` turns them into a scale and a zero point, per tensor or per channel, and ``write_turbomind`` into LMDeploy's
raw files (``qparams.py``).  Both results are safetensors files with a checked header: ``files/calibration.py``.
"""

from ..files.calibration import QParams, Statistics, hand_over, read_qparams
from .observe import collect
from .qparams import compute, write_turbomind

__all__ = ["QParams", "Statistics", "collect", "compute", "hand_over", "read_qparams", "write_turbomind"]
