"""How much accuracy a quantized cache costs, measured through the cache that generation uses.

``harness.py`` reads text through caches, chunk by chunk beside the exact model; ``generate.py`` decodes a continuation
through them, token by token; ``metrics.py`` compares next-token distributions; ``text.py`` cuts text into windows;
``outliers.py`` gives any model the outlier keys that make quantizing hard; ``baselines.py`` puts transformers' own
quantized caches to the same test; ``figure.py`` draws the result.

``needle.py`` asks for a fact in a long text, and ``heatmap.py`` draws where it was found.  ``lm_eval_model.py`` is a
model for lm-eval, and ``compare.py`` runs its tasks with several caches, problem by problem: ``answer_file.py`` keeps
the answers, ``paired.py`` has the statistics.  Nothing else here imports the first two, which need lm-eval.
"""

from .generate import Decoded, decode
from .harness import Contender, Result, Storage, evaluate, paged
from .metrics import Accuracy
from .needle import find_needles, hide_needles
from .outliers import with_outlier_keys
from .text import cut_windows

__all__ = [
    "Accuracy",
    "Contender",
    "Decoded",
    "Result",
    "Storage",
    "cut_windows",
    "decode",
    "evaluate",
    "find_needles",
    "hide_needles",
    "paged",
    "with_outlier_keys",
]
