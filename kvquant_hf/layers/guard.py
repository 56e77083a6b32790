"""Whether the layers of a cache have all finished the last step."""

from __future__ import annotations

import weakref
from typing import Any

from ..errors import InterruptedForwardError
from ..pages.budget import Claim


class StepGuard:
    """Notices that a forward pass stopped half way, by comparing the layers of one cache.

    The first layer that is ever updated leads; layers that take as many tokens in the same step follow, and must hold
    as many as the leader did.  Layers that go their own way (cross attention inside the same cache) are left alone.

    Layers are referred to weakly: they hold the guard, and a cycle would keep the memory of a dropped cache until the
    garbage collector runs.
    """

    def __init__(self) -> None:
        self._leader: weakref.ref[Any] | None = None
        self._followers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._before = 0  # tokens the leader held before this step
        self._step = 0  # tokens of this step
        self._known = object()  # by layers among the followers, which have it too
        self.claim: Claim | None = None  # the pages of this step

    def enter(self, layer: Any, held: int, count: int) -> None:
        """``layer``, which holds ``held`` tokens, is about to take ``count``.

        Raises:
            InterruptedForwardError: the layers are not level.
        """
        leader = None if self._leader is None else self._leader()
        if leader is None:
            leader, self._leader = layer, weakref.ref(layer)
        if layer is leader:
            lengths = [held, *(follower.length for follower in self._followers)]
            if min(lengths) != max(lengths):
                raise InterruptedForwardError(self._message(lengths))
            self._before, self._step = held, count
        elif count == self._step:
            if held != self._before:
                raise InterruptedForwardError(self._message([self._before, held]))
            if layer.known is not self._known:
                self._followers.add(layer)
                layer.known = self._known

    def __reduce__(self) -> tuple[type[StepGuard], tuple[()]]:
        return StepGuard, ()  # weak references cannot be copied or saved; the copied layers make themselves known

    @staticmethod
    def _message(lengths: list[int]) -> str:
        held = ", ".join(map(str, sorted(set(lengths), reverse=True)))
        return (
            f"the last forward pass was interrupted and the layers hold {held} tokens; call cache.rollback() to drop "
            "the unfinished tokens, or cache.reset() to start again."
        )
