"""Everything this package raises or warns of on purpose.  An error is one sentence that ends with the remedy."""


class KVQuantError(Exception):
    """Base of all errors raised by kvquant_hf."""


class UnknownPolicyError(KVQuantError, ValueError):
    """The policy, codec or option asked for does not exist."""


class PolicyFileError(UnknownPolicyError):
    """A file is no policy by layer that this version can read."""


class UnsupportedModelError(KVQuantError, ValueError):
    """The model has no cache that could be quantized, or a head_dim that a codec cannot store."""


class UnsupportedVersionError(KVQuantError, ImportError):
    """The installed transformers is outside the tested range."""


class CacheMismatchError(KVQuantError, ValueError):
    """Keys and values do not fit what the cache already holds (heads, head_dim or device), or would be written into."""


class BatchSizeError(CacheMismatchError):
    """The batch size changed between two calls."""


class WrongModelError(CacheMismatchError):
    """The cache was filled by another model."""


class SavedCacheError(KVQuantError, ValueError):
    """A file is no saved cache that this version can load, or a cache holds what a file cannot."""


class InterruptedForwardError(KVQuantError, RuntimeError):
    """The last forward pass stopped half way, so the layers hold different numbers of tokens."""


class RollbackError(KVQuantError, RuntimeError):
    """Tokens cannot be taken back, because what came before them is no longer held."""


class OutOfPages(KVQuantError, MemoryError):  # noqa: N818  # a condition to be met, like StopIteration, not a mistake
    """A step needs more pages than the budget has; the cache is as it was before the step."""


class PoolMismatchError(CacheMismatchError):
    """The shared pools were made for another model, policy or page size, or have options of their own."""


class QParamsError(KVQuantError, ValueError):
    """Calibrated parameters are missing, cannot be read, or were given to a policy that takes none."""


class CalibrationError(KVQuantError, RuntimeError):
    """A calibration is worth nothing: NaN or infinity among the keys or values, or a cache that was not used."""


class GradientError(KVQuantError, RuntimeError):
    """Keys or values carry a gradient; rounding has none."""


class StaleCarrierError(KVQuantError, RuntimeError):
    """Keys or values returned by an earlier ``update`` were read after the cache had changed."""


class ImplementationError(KVQuantError, RuntimeError):
    """The implementation asked for does not exist or cannot run on this device, dtype or page."""


class EvaluationInputError(KVQuantError, ValueError):
    """What is to be evaluated cannot be: too little text, an unknown baseline, a step that does not divide a page."""


class EvaluationError(KVQuantError, RuntimeError):
    """A measurement is worth nothing: NaN among the logits, or attention that did not go through the cache."""


class BenchmarkInputError(KVQuantError, ValueError):
    """What is to be timed cannot be: an unknown cache or shape, a context too short for its steps, a bad file."""


class BenchmarkError(KVQuantError, RuntimeError):
    """Times would be worth nothing, because results differ that must be equal."""


class MissingPackageError(KVQuantError, ImportError):
    """An optional package is needed for what was asked."""


class CacheFullError(KVQuantError, RuntimeError):
    """A static cache has no room for more tokens."""


class StaticCacheError(KVQuantError, RuntimeError):
    """A static cache is asked for what would change its memory."""


class BatchingError(KVQuantError, ValueError):
    """Continuous batching is asked for in a way that quantized pages cannot honour."""


class ServingError(KVQuantError, ValueError):
    """A server is asked for what it cannot do."""


class NoServerError(KVQuantError, RuntimeError):
    """No server of ``kvquant serve`` answers a client, or not to its key."""


class KVQuantWarning(UserWarning):
    """Base of all warnings of kvquant_hf."""


class KVQuantVersionWarning(KVQuantWarning):
    """The installed transformers is newer than what was tested."""


class KVQuantDroppedCacheWarning(KVQuantWarning):
    """A quantized cache was given to ``generate``, and the model did not use it."""


class KVQuantRangeWarning(KVQuantWarning):
    """Keys or values were beyond what the scales of their pages can hold."""


class KVQuantFallbackWarning(KVQuantWarning):
    """Attention read the cache multiplied out instead of in pages."""


class KVQuantBatchingWarning(KVQuantWarning):
    """A list of prompts was answered one by one instead of being batched continuously."""
