"""Stop strings: whatever pieces a text comes in, it ends where the whole text would be cut."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kvquant_hf.serving.stops import StopFilter


def passed(pieces: list[Any], stops: list[str]) -> tuple[list[Any], bool]:
    found: list[Any] = []
    filtered = StopFilter(found.append, stops)
    for piece in pieces:
        filtered.put_nowait(piece)
    return found, filtered.stopped


def cut(text: str, stops: list[str]) -> str:
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


@given(st.lists(st.text("ab", max_size=4), max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_as_if_the_text_had_come_at_once(pieces: list[str], stops: list[str]) -> None:
    found, stopped = passed([*pieces, None], stops)
    whole = "".join(pieces)
    first = min((whole.find(stop) + len(stop) for stop in stops if stop in whole), default=None)
    # What came before the first stop string was complete; a longer one that begins earlier comes too late.
    expected = whole if first is None else cut(whole[: _seen(pieces, first)], stops)
    assert "".join(found[:-1]) == expected
    assert found[-1] is None and stopped == (first is not None)


def _seen(pieces: list[str], first: int) -> int:
    """Characters that had come when ``first`` had."""
    length = 0
    for piece in pieces:
        length += len(piece)
        if length >= first:
            break
    return length


def test_nothing_is_held_back_that_cannot_stop() -> None:
    assert passed(["on", "e ", "tw"], ["two"]) == (["on", "e "], False)
    assert passed(["tw", "in", None], ["two"]) == (["twin", None], False)


def test_other_items_pass_and_push_what_is_held() -> None:
    marker = object()
    assert passed(["tw", marker, "o", None], ["two"])[0] == ["tw", marker, "o", None]
