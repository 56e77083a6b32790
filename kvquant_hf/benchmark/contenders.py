"""What is compared: transformers' own caches, and ours by policy; and what each is expected to take of memory."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from transformers import cache_utils

from ..cache import QuantizedPagedCache
from ..errors import BenchmarkInputError, MissingPackageError
from ..evaluation.baselines import BACKENDS, held_bytes, parse_baseline
from ..pages.queries import SeenQueries
from ..policies.auto import AutoPolicy
from ..policies.cost import page_cost
from ..policies.table import POLICIES, KVPolicy, parse_policy

DYNAMIC, EXACT = "dynamic", "exact"
BASELINES = ("static", "quanto-4", "hqq-4", "fp8")
USUAL_POLICIES = ("exact", "int8", "int4", "turboquant")
PAGE_SIZE = 64
OURS, THEIRS = "kvquant", "transformers"


class Contender(NamedTuple):
    """A kind of cache.

    Args:
        name: a policy, or the name of one of transformers' caches.
        family: ``OURS`` or ``THEIRS``.
        lossless: whether nothing is rounded, so that its choices must be those of ``DynamicCache``.
        make: ``make(model, tokens)`` returns an empty cache for up to ``tokens`` tokens of each sequence.
        missing: why it cannot run here, or "".
    """

    name: str
    family: str
    lossless: bool
    make: Callable[[Any, int], Any]
    missing: str = ""

    def held(self, cache: Any) -> int:
        """Bytes that a cache of this kind holds, measured on its tensors."""
        if self.family == OURS:
            report = cache.report()
            return int(report.bytes + report.other_bytes)
        return held_bytes(cache)


def choose(policies: Sequence[str] = USUAL_POLICIES, baselines: Sequence[str] = BASELINES) -> list[Contender]:
    """The contenders of a run: ``DynamicCache`` and ``exact`` always (all others are checked against the first, and the
    second says whether our own arithmetic can be trusted), then ``baselines``, then ``policies``; each once.

    Raises:
        UnknownPolicyError: no such policy.
        BenchmarkInputError: no such baseline.
    """
    chosen = [_ours(EXACT), *(_ours(name) for name in policies)]
    theirs = [_theirs(DYNAMIC), *(_theirs(name) for name in baselines)]
    return list({contender.name: contender for contender in (*theirs, *chosen)}.values())


def _ours(name: str) -> Contender:
    policy = parse_policy(name)  # of a budget, what it stands for is decided for each model, which no row would say
    if isinstance(policy, AutoPolicy):
        raise BenchmarkInputError(f"a row is one policy, and {name!r} is a budget; name the policy that it stands for.")

    def make(model: Any, tokens: int) -> QuantizedPagedCache:
        cache = QuantizedPagedCache(model.config, policy, page_size=PAGE_SIZE)
        cache.bind(model)
        return cache

    shown = policy.name if policy.name in POLICIES else name
    if shown in BASELINES and isinstance(policy, KVPolicy):
        shown = f"{policy.keys}/{policy.values}"  # transformers has a cache of this name
    return Contender(shown, OURS, policy == POLICIES[EXACT], make)


def _theirs(name: str) -> Contender:
    if name == DYNAMIC:
        return Contender(name, THEIRS, True, lambda model, tokens: transformers.DynamicCache(config=model.config))
    if name == "static":

        def static(model: Any, tokens: int) -> Any:
            return transformers.StaticCache(config=model.config, max_cache_len=tokens)

        return Contender(name, THEIRS, True, static)
    if name == "fp8":
        missing = ""
        if not hasattr(cache_utils, "Fp8QuantizedLayer"):
            missing = f"transformers {transformers.__version__} has no fp8 cache"
        return Contender(name, THEIRS, False, lambda model, tokens: _quantized(model, backend="fp8"), missing)
    kind, _, bits = name.rpartition("-")
    if kind not in BACKENDS or bits not in map(str, BACKENDS[kind].bits):
        names = ", ".join(f"{kind}-{n}" for kind, backend in BACKENDS.items() for n in backend.bits)
        raise BenchmarkInputError(f"transformers has no cache {name!r}; use {DYNAMIC}, static, fp8, {names}.")
    axis, missing = BACKENDS[kind].axis, ""
    try:
        parse_baseline(name)
    except MissingPackageError:
        missing = f"{BACKENDS[kind].package} is not installed"
    options = {"backend": kind, "nbits": int(bits), "axis_key": axis, "axis_value": axis}
    return Contender(name, THEIRS, False, lambda model, tokens: _quantized(model, **options), missing)


def _quantized(model: Any, **options: Any) -> Any:
    return transformers.QuantizedCache(config=model.config, **options)


class Dimensions(NamedTuple):
    """What of a model decides memory."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int

    @classmethod
    def of(cls, config: Any) -> "Dimensions":
        """Of the decoder of a config."""
        decoder = config.get_text_config(decoder=True)
        heads, hidden = decoder.num_attention_heads, decoder.hidden_size
        return cls(
            decoder.num_hidden_layers,
            heads,
            getattr(decoder, "num_key_value_heads", None) or heads,
            getattr(decoder, "head_dim", None) or hidden // heads,
            hidden,
            getattr(decoder, "intermediate_size", None) or 4 * hidden,
        )

    def elements_per_token(self) -> int:
        """Key and value elements of a token in one layer."""
        return 2 * self.kv_heads * self.head_dim


def expected_bytes(name: str, dims: Dimensions, tokens: int, dtype: torch.dtype, batch: int = 1) -> int:
    """Upper bound of what a cache holds for ``batch`` sequences of ``tokens``; sliding windows count in full.

    Ours: sealed pages, 1/32 of them (or one) reserved ahead, open pages and page tables, and what is kept of queries.
    """
    elements = dims.elements_per_token()
    dense = batch * tokens * elements * dtype.itemsize
    if name in (DYNAMIC, "static"):
        per_layer: float = dense
    elif name == "fp8":
        per_layer = batch * tokens * elements
    elif name.rpartition("-")[0] in BACKENDS:
        # A scale and an offset of the dtype for 64 elements; the last 128 tokens may be exact.
        bits = int(name.rpartition("-")[2]) + 16 * dtype.itemsize / 64
        per_layer = batch * (tokens * elements * bits / 8 + 128 * elements * dtype.itemsize)
    else:
        cost = page_cost(name, dims.head_dim, heads=dims.kv_heads, page_size=PAGE_SIZE, dtype=dtype)
        pages = batch * ((tokens - 1) // PAGE_SIZE) + 1  # the last 1 to 64 tokens are in open pages; one of padding
        page = PAGE_SIZE * cost.bytes_per_token
        open_pages = batch * PAGE_SIZE * elements * dtype.itemsize
        per_layer = (pages * 33 / 32 + 1) * page + open_pages + 16 * pages + 64 * batch
        if parse_policy(name).uses_queries:
            per_layer += batch * SeenQueries.most_bytes(dims.kv_heads, dims.head_dim, dims.query_heads, dtype.itemsize)
    return round(dims.layers * per_layer)


def working_bytes(name: str, dims: Dimensions, tokens: int, chunk: int, dtype: torch.dtype) -> int:
    """Rough size of what comes and goes while a prompt is read in chunks: activations, the mask, and for caches that
    hand over dense keys and values, those of one layer twice (old and new) and once for each head of a group."""
    activations = chunk * (8 * dims.hidden + 3 * dims.intermediate) * dtype.itemsize
    mask = 2 * chunk * tokens * dtype.itemsize
    layer = tokens * dims.elements_per_token() * dtype.itemsize
    dense = (2 + dims.query_heads // dims.kv_heads) * layer
    paged = name not in (DYNAMIC, *BASELINES) and name.rpartition("-")[0] not in BACKENDS
    return activations + mask + (layer if paged else dense)
