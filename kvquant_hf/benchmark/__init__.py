"""How fast and how large KV caches are, side by side: transformers' own and ours.

    from kvquant_hf.benchmark import compare, shape

    result = compare(shape("smollm2-135m", layers=4), contexts=(512, 2048), policies=("int8", "int4"))
    result            # a table
    result.figure()   # speed and memory against context

``subject.py`` is the model (``shapes.py``: known shapes with random weights), ``contenders.py`` what is compared,
``plan.py`` what fits, ``machine.py`` where it runs.  ``speed/`` compares caches one call at a time, ``serving/`` runs
many requests in batches that a budget of memory allows, ``load/`` sends them to running servers.
"""

from .serving.results import Serving
from .serving.rows import ServingRow
from .serving.serve import serve
from .serving.workload import Request, draw_requests, read_requests, sharegpt_requests
from .shapes import SHAPES
from .speed.compare import compare
from .speed.results import Comparison
from .speed.rows import Row
from .subject import Subject, in_memory, shape

__all__ = [
    "SHAPES",
    "Comparison",
    "Request",
    "Row",
    "Serving",
    "ServingRow",
    "Subject",
    "compare",
    "draw_requests",
    "in_memory",
    "read_requests",
    "serve",
    "shape",
    "sharegpt_requests",
]
