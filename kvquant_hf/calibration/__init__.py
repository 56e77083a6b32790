"""Calibration beforehand: extremes of keys and values over a text, of which policy ``int8-static`` has its scales, and
moments of queries, a prior for policies that round keys by them.

``collect`` reads text through a model and keeps the smallest and largest element of every channel, and the moments
(``observe.py``); ``compute`` turns the extremes into a scale and a zero point, per tensor or per channel, and
``write_turbomind`` into LMDeploy's raw files (``qparams.py``).  Both results are safetensors files with a checked
header: ``files/calibration.py``.
"""

from ..files.calibration import QParams, Statistics, hand_over, read_qparams
from .observe import collect
from .qparams import compute, write_turbomind

__all__ = ["QParams", "Statistics", "collect", "compute", "hand_over", "read_qparams", "write_turbomind"]
