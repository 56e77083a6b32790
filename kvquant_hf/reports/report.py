"""What a cache holds and what ran on it, at one moment."""

import html
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class CacheReport:
    """A cache at one moment.

    Args:
        policy: name of the policy.
        page_size: tokens per page.
        sinks: first tokens of each sequence that are kept exact, in the layers that keep most.
        tokens: tokens per sequence.
        batch_size: number of sequences.
        paged_layers: layers that are stored in pages.
        sliding_layers: those of them that hold a sliding window only, by the tokens of the window.
        vectors: what is stored of a token, heads x head_dim, and by how many of the paged layers.
        other_layers: layers that keep transformers' own cache, by class name.
        bytes: everything held for the paged layers: packed pages, open pages, unused pages of the pools, page tables,
            calibrated parameters, and what lies both in the CPU's memory and on a device.
        packed_bytes: sealed pages in use, shared pages counted once.
        open_page_bytes: open pages and first tokens that are exact, in the model's dtype, full or not.
        unused_bytes: reserved in the pools and not used; 0 for a cache with ``pool=``, whose ``report()`` counts them
            for all caches.
        shared_bytes: of ``packed_bytes``, the pages that several sequences refer to, be it beams, samples or forks of
            one prompt; each counted once.
        holders: most sequences that refer to one page; 1 where nothing is shared.
        devices: bytes of the pools and open pages by the device on which they lie at this moment (whole pools, also
            where other caches draw from them).
        other_bytes: bytes of the other layers.
        dense_bytes: the paged layers' tokens in the model's dtype; of a sliding window, those that the next token sees.
        dtype: the model's dtype.
        elements: key and value elements held by the paged layers.
        sealed_elements: those of them that lie in sealed pages, counted for every sequence.
        reopened_pages: sealed pages that a crop had to decode into the open page.
        saturated_pages: pages with keys or values beyond what their scales, mostly fp16, can hold, and so cut off;
            found when the report is made, by the scales that are at the end of their range.  A ``KVQuantRangeWarning``
            says so once: on a CPU when such a page is sealed; of static caches and on a GPU, which is not waited for,
            with the report.  ``exact`` has no scales; those of ``int8-static`` are measured beforehand.
        feedback_pages, nearest_pages: of codecs that round keys by queries, pages sealed in the metric of those seen
            or of a calibration, and pages sealed without, every code the nearest one (no query had come by; static
            caches, but for the first prompt with a calibration).
        implementation: what computed attention over pages: ``"triton"``, ``"cpu"``, ``"reference"`` (plain torch),
            several of them, or ``""`` before the first call.
        implementation_reason: why the kernels did not run, if they might have.
        paged_calls, prefill_calls, open_calls, fallback_calls: attention calls by path: on pages; on the exact keys and
            values of a first prompt; on an open page beside which nothing is packed yet, which is exact too; on pages
            multiplied out.  Those inside of compiled graphs are not counted.
        fallback_reasons: fallback calls by reason.
        restarts: how often a model dropped what was held in the middle of ``generate`` and read all tokens again, by
            its method.
        dropped: which method of a model was given the cache and did not use it; empty if none.
    """

    policy: str
    page_size: int
    sinks: int
    tokens: int
    batch_size: int
    paged_layers: int
    sliding_layers: dict[str, int]
    vectors: dict[str, int]
    other_layers: dict[str, int]
    bytes: int
    packed_bytes: int
    open_page_bytes: int
    unused_bytes: int
    shared_bytes: int
    holders: int
    devices: dict[str, int]
    other_bytes: int
    dense_bytes: int
    dtype: str
    elements: int
    sealed_elements: int
    reopened_pages: int
    saturated_pages: int
    feedback_pages: int
    nearest_pages: int
    implementation: str
    implementation_reason: str
    paged_calls: int
    prefill_calls: int
    open_calls: int
    fallback_calls: int
    fallback_reasons: dict[str, int]
    restarts: dict[str, int]
    dropped: str

    @property
    def ratio(self) -> float:
        """How many times smaller than the model's dtype, everything held counted; 0 for an empty cache."""
        return self.dense_bytes / self.bytes if self.bytes else 0.0

    @property
    def bits_per_element(self) -> float:
        """Bits held per key or value element, everything counted; 0 for an empty cache."""
        return 8 * self.bytes / self.elements if self.elements else 0.0

    @property
    def page_bits_per_element(self) -> float:
        """Bits per element inside sealed pages; 0 while no page is sealed."""
        return 8 * self.packed_bytes / self.sealed_elements if self.sealed_elements else 0.0

    def as_dict(self) -> dict[str, Any]:
        """All fields and the three derived numbers, ready for JSON."""
        derived = ("ratio", "bits_per_element", "page_bits_per_element")
        return asdict(self) | {name: getattr(self, name) for name in derived}

    def rows(self) -> list[tuple[str, str]]:
        """Label and text of each line of the printed report."""
        windows = "".join(f", {n} of them the last {window} tokens" for window, n in self.sliding_layers.items())
        layers = f"{self.paged_layers} paged{windows}" + "".join(
            f", {n} {name}" for name, n in self.other_layers.items()
        )
        reasons = "".join(f"; {n} {reason}" for reason, n in self.fallback_reasons.items())
        exact = ", the first one exact" if self.sinks == 1 else f", the first {self.sinks} exact" if self.sinks else ""
        bits = f"{self.bits_per_element:.2f} held, {self.page_bits_per_element:.2f} in sealed pages"
        ran = f" ({self.implementation})" if self.implementation else ""
        places = ", ".join(f"{format_size(count)} on {device}" for device, count in self.devices.items())
        return [
            ("policy", f"{self.policy}, pages of {self.page_size} tokens{exact}"),
            ("tokens", f"{self.tokens} x batch {self.batch_size}"),
            ("layers", layers),
            *([("of a token", "; ".join(self.vectors))] if self.vectors else []),
            (
                "held",
                f"{format_size(self.bytes)} against {format_size(self.dense_bytes)} in {self.dtype}: "
                f"ratio {self.ratio:.2f}",
            ),
            (
                "of which",
                f"pages {format_size(self.packed_bytes)}, open pages {format_size(self.open_page_bytes)}, "
                f"unused {format_size(self.unused_bytes)}",
            ),
            *([("lies", places)] if places else []),
            *(
                [("shared", f"{format_size(self.shared_bytes)} by up to {self.holders} sequences")]
                if self.shared_bytes
                else []
            ),
            *(
                [("other layers", f"{format_size(self.other_bytes)} in transformers' own caches")]
                if self.other_layers
                else []
            ),
            ("bits per element", bits),
            *(
                [("out of range", f"{self.saturated_pages} pages with keys or values beyond what their scales hold")]
                if self.saturated_pages
                else []
            ),
            *(
                [("rounding", f"{self.feedback_pages} pages by queries, {self.nearest_pages} to the nearest code")]
                if self.feedback_pages or self.nearest_pages
                else []
            ),
            (
                "attention calls",
                f"{self.paged_calls} in pages{ran}, {self.prefill_calls} exact prefill, "
                f"{self.open_calls} before a page was full, {self.fallback_calls} multiplied out{reasons}",
            ),
            *((("begun again", f"{n} x by {method}") for method, n in self.restarts.items())),
            *([("not used", self.dropped)] if self.dropped else []),
            *([("kernels", f"not used: {self.implementation_reason}")] if self.implementation_reason else []),
        ]

    def __str__(self) -> str:
        return "\n".join(f"{label:<17} {text}" for label, text in self.rows())

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(label)}</th>"
            f"<td style='text-align:left'>{html.escape(text)}</td></tr>"
            for label, text in self.rows()
        )
        return f"<table>{cells}</table>"


def format_size(count: float) -> str:
    """Bytes with a decimal unit."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} GB"
