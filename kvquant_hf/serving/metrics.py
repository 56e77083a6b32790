"""What a server says of itself: to Prometheus, and in ``/kvquant/report``."""

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..batching.report import BatchingReport
from ..reports.report import CacheReport
from .batched import BatchedEngine
from .ledger import Entry, Ledger
from .sequential import SequentialEngine

Engine = BatchedEngine | SequentialEngine

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_SECONDS_PER_TOKEN = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)


class Metrics:
    """Histograms and counters that requests fill, and gauges that are read when they are asked for."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        options: dict[str, Any] = {"registry": self._registry, "namespace": "kvquant"}
        self._requests = Counter("requests", "Requests that are over, by what became of them.", ["outcome"], **options)
        self._prompt = Counter("prompt_tokens", "Tokens of prompts.", **options)
        self._generated = Counter("generated_tokens", "Tokens that were generated.", **options)
        self._ttft = Histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", buckets=_SECONDS, **options
        )
        self._tpot = Histogram(
            "time_per_output_token_seconds",
            "Between the tokens of a request, its mean.",
            buckets=_SECONDS_PER_TOKEN,
            **options,
        )
        self._whole = Histogram(
            "request_seconds", "From a finished request's arrival to its last token.", buckets=_SECONDS, **options
        )

    def watch(self, ledger: Ledger, engine: Engine) -> None:
        """Read gauges from these."""
        self._registry.register(_Gauges(ledger, engine))

    def refused(self) -> None:
        """A request found no room."""
        self._requests.labels("refused").inc()

    def closed(self, entry: Entry) -> None:
        """A request is over."""
        self._requests.labels(entry.outcome).inc()
        self._prompt.inc(entry.prompt_tokens)
        self._generated.inc(entry.tokens)
        if entry.tokens:
            self._ttft.observe(entry.ttft)
        if entry.tokens > 1:
            self._tpot.observe(entry.tpot)
        if entry.outcome == "finished":
            self._whole.observe(entry.last - entry.arrived)

    def text(self) -> bytes:
        """Everything in the text format of Prometheus."""
        return generate_latest(self._registry)


class _Gauges:
    """A collector of what is so at the moment of asking."""

    def __init__(self, ledger: Ledger, engine: Engine) -> None:
        self._ledger, self._engine = ledger, engine

    def collect(self) -> Iterable[Metric]:
        """The gauges."""
        found = overview(self._ledger, self._engine)
        cache = found["cache"]
        gauges = {
            "requests_running": ("Requests that have pages.", found["requests"]["running"]),
            "requests_waiting": ("Requests that wait for pages.", found["requests"]["waiting"]),
            "cache_bytes": ("Bytes of pages that are in use or kept.", found["bytes_held"]),
            "cache_bytes_saved": ("Bytes that the same tokens would take more as they are.", found["bytes_saved"]),
        }
        if found["continuous_batching"]:
            gauges |= {
                "pages_used": ("Blocks, a page of each layer, that requests have.", cache["used_blocks"]),
                "pages_kept": ("Blocks that are kept for prompts that begin alike.", cache["cached_blocks"]),
                "pages_free": ("Blocks that nobody has.", cache["free_blocks"]),
            }
            shared = CounterMetricFamily("kvquant_shared_tokens", "Tokens of prompts that were found in pages.")
            shared.add_metric([], cache["shared_tokens"])
            yield shared
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"kvquant_{name}", text, value=value)

    def describe(self) -> Iterable[Metric]:
        """Nothing is computed to register."""
        return ()


def overview(ledger: Ledger, engine: Engine) -> dict[str, Any]:
    """The numbers of ``/kvquant/report``.

    Returns:
        ``continuous_batching``; ``requests``: running, waiting, and those over by outcome; ``tokens``: prompt and
        generated; ``bytes_held``: of sealed pages in use or kept and of open pages of live requests; ``dense_bytes``:
        of the same tokens in the model's dtype; ``bytes_saved``; ``most_used_blocks``; ``cache``: the engine's report.
    """
    report = engine.report()
    if isinstance(report, BatchingReport):
        running = report.live_requests
        sealed = report.used_blocks + report.cached_blocks
        open_bytes = report.open_page_bytes // report.requests * report.live_requests
        held = sealed * report.bytes_per_block + open_bytes
        dense = sealed * report.dense_bytes_per_block + open_bytes
        most = report.most_used_blocks
    else:
        running, most = min(1, len(ledger.live)), 0
        held, dense = (report.bytes, report.dense_bytes) if isinstance(report, CacheReport) else (0, 0)
    live = list(ledger.live.values())
    return {
        "continuous_batching": isinstance(report, BatchingReport),
        "requests": {"running": running, "waiting": max(0, len(live) - running)}
        | {name: ledger.outcomes[name] for name in ("finished", "failed", "cancelled", "refused")},
        "tokens": {
            "prompt": ledger.prompt_tokens + sum(entry.prompt_tokens for entry in live),
            "generated": ledger.generated_tokens + sum(entry.tokens for entry in live),
        },
        "bytes_held": held,
        "dense_bytes": dense,
        "bytes_saved": dense - held,
        "most_used_blocks": most,
        "cache": None if report is None else report.as_dict(),
    }
