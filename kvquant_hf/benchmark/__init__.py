"""How fast and how large KV caches are, side by side: transformers' own and ours.

    from kvquant_hf.benchmark import compare, shape

    result = compare(shape("smollm2-135m", layers=4), contexts=(512, 2048), policies=("int8", "int4"))
    result            # a table
    result.figure()   # speed and memory against context

``compare.py`` runs it: ``subject.py`` is the model (``shapes.py``: known shapes with random weights), ``contenders.py``
what is compared, ``plan.py`` what fits, ``check.py`` comes before any time, ``speed.py`` times decode steps in turn,
``apart.py`` measures memory in processes of their own.  ``results.py``, ``tables.py`` and ``figure.py`` show it.
``serving.py`` runs many requests in batches that a budget of memory allows; ``workload.py`` draws them, ``batching.py``
fills the batches.
"""

from .compare import compare
from .results import Comparison, Row
from .serving import serve
from .serving_results import Serving, ServingRow
from .shapes import SHAPES
from .subject import Subject, in_memory, shape
from .workload import Request, draw_requests, read_requests

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
]
