"""What a cache sees to as its layers take new tokens: pages for all or for none, and which pages visit the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..pages.budget import Budget, Pool
from .paged import PagedLayer


class StepPlan:
    """Makes each step of one cache happen in all layers or in none, as far as pages are concerned.

    A step begins with the first layer that is updated again.  What it needs in all layers is claimed then.  Only where
    it is not known yet what a page of a layer is, in the first step on new pools, can a later layer be refused; all
    layers are then emptied again.

    Args:
        budget: what the layers' pools take from.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._last = math.inf  # the layer that was updated last
        self._paged: list[int] = []  # tokens of each paged layer when the step began
        self._others: list[tuple[Any, dict[str, Any]]] = []  # the other layers, and what they were while empty

    def enter(self, layers: Sequence[Any], index: int, batch: int, tokens: int) -> None:
        """``layers[index]`` is about to take ``tokens`` tokens of ``batch`` sequences.

        Raises:
            OutOfPages: the step needs more pages than there are; nothing has changed.
        """
        if self._budget.bounded:
            if index <= self._last:
                self.begin(layers, batch, tokens)
            self._last = index

    def leave(self, layers: Sequence[Any], index: int) -> None:
        """``layers[index]`` has taken its tokens.  With the last layer the step ends: a claim can be too large, where
        pages turn out to be different or a layer to keep fewer of them."""
        if self._budget.bounded and not any(isinstance(layer, PagedLayer) for layer in layers[index + 1 :]):
            self.end(layers)

    def begin(self, layers: Sequence[Any], batch: int, tokens: int) -> None:
        """A step of ``tokens`` tokens begins.

        Raises:
            OutOfPages: it needs more pages than there are.
        """
        self.end(layers)
        paged = [layer for layer in layers if isinstance(layer, PagedLayer)]
        level = paged[0].length
        pages: dict[Pool, int] = {}
        for layer in paged:
            if layer.length == level:  # others go their own way (cross attention inside the same cache)
                pages |= layer.pages_for(batch, tokens)
        paged[0].guard.claim = self._budget.claim(pages)
        self._paged = [layer.length for layer in paged]
        if level == 0:
            self._others = [(layer, _state(layer)) for layer in layers if not isinstance(layer, PagedLayer)]

    def end(self, layers: Sequence[Any]) -> None:
        """Give back what the last step has claimed and not taken; the next update begins a step."""
        self._last, self._others = math.inf, []
        for layer in layers:
            if isinstance(layer, PagedLayer) and layer.guard.claim is not None:
                layer.guard.claim.close()
                layer.guard.claim = None

    def undo(self, layers: Sequence[Any]) -> None:
        """Bring all layers back to where the step began."""
        for layer, before in zip((x for x in layers if isinstance(x, PagedLayer)), self._paged, strict=True):
            if before == 0:
                layer.clear()
            else:
                layer.drop(max(0, layer.length - before))
        for layer, state in self._others:
            vars(layer).clear()
            vars(layer).update(state)
        self.end(layers)

    def __deepcopy__(self, memo: dict[int, object]) -> StepPlan:
        return StepPlan(self._budget)

    def __getstate__(self) -> dict[str, Any]:
        return vars(StepPlan(self._budget))


def _state(layer: Any) -> dict[str, Any]:
    """The attributes of a layer, its dicts and lists copied."""
    return {name: value.copy() if isinstance(value, (dict, list)) else value for name, value in vars(layer).items()}


class Rotation:
    """Which offloaded layers' pages are on the device: the current layer's, and the next one's on their way."""

    def __init__(self) -> None:
        self._current: int | None = None

    def enter(self, layers: Sequence[Any], index: int) -> None:
        """``layers[index]``, a paged one, is about to take new tokens.

        The layer before it leaves only now: attention reads its pages after their update, and by now that has been
        given to the device.
        """
        paged = [i for i, layer in enumerate(layers) if isinstance(layer, PagedLayer)]
        following = paged[(paged.index(index) + 1) % len(paged)]
        if self._current not in (None, index, following):
            layers[self._current].offload()
        if following != index:
            layers[following].prefetch()
        self._current = index
