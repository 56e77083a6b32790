"""Answers end before a stop string, and no part of one is sent before it is known to be none."""

from collections.abc import Callable, Sequence
from typing import Any


class StopFilter:
    """A queue that looks for stop strings in what passes through it.

    Args:
        sink: gets what passes: pieces of text, other items as they come, and None at the end.
        stops: strings before which the text ends.
    """

    def __init__(self, sink: Callable[[Any], None], stops: Sequence[str] = ()) -> None:
        self._sink = sink
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False  # at a stop string: nothing more passes but the end

    def put_nowait(self, item: Any) -> None:
        """Take a piece of text, another item, or None at the end.  Only plain strings are searched: a model's
        reasoning, which is a kind of string, is no part of its answer."""
        if type(item) is str:
            if not self.stopped:
                self._search(item)
            return
        self._pass(self._held)
        self._held = ""
        if item is None or not self.stopped:
            self._sink(item)

    def _search(self, piece: str) -> None:
        text = self._held + piece
        places = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if places:
            self.stopped, self._held = True, ""
            self._pass(text[: min(places)])
            return
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        self._pass(text[: len(text) - held])

    def _pass(self, text: str) -> None:
        if text:
            self._sink(text)


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of ``text`` that may be the beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
