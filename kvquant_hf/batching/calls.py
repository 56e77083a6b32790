"""What the two ends of a call tell each other past transformers, and the name under which they meet in a model."""

from contextvars import ContextVar

from ..errors import KVQuantError

ATTENTION = "kvquant_batched"  # the attention function, while a manager of ours runs

# ``generate_batch`` writes what ``add_request`` raises, and what ends the run, into the log and returns what it has;
# ours raises it after all.
REFUSED: ContextVar[list[KVQuantError] | None] = ContextVar("kvquant_hf_refused", default=None)
