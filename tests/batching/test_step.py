"""How rows of a packed batch become calls, and who gets which slot."""

import torch

from kvquant_hf.batching.model import Place, places_of
from kvquant_hf.batching.slots import OpenPages
from kvquant_hf.batching.step import Row, group_rows
from kvquant_hf.pages.layout import StoreLayout
from kvquant_hf.triton_kernels.codecs import CODECS

PAGE = 8
CPU = torch.device("cpu")


def layout() -> StoreLayout:
    like = torch.empty(1, 2, 0, 16)
    return StoreLayout(CODECS["exact"], CODECS["exact"], PAGE, like, like, "auto")


def test_rows_become_few_calls() -> None:
    """Single tokens of neighbouring slots are one call; a gap makes two; each chunk is one of its own."""
    rows = [
        Row(slot=4, start=0, new=1, past=20, sealed=2, blocks=[[7, 9]]),
        Row(slot=1, start=1, new=5, past=0, sealed=0, blocks=[[]]),
        Row(slot=2, start=6, new=1, past=8, sealed=0, blocks=[[3]]),
        Row(slot=3, start=7, new=1, past=3, sealed=0, blocks=[[]]),
        Row(slot=0, start=8, new=0, past=3, sealed=0, blocks=[[]]),  # takes part in nothing
        Row(slot=6, start=8, new=1, past=1, sealed=0, blocks=[[]]),
        Row(slot=5, start=9, new=9, past=16, sealed=1, blocks=[[1, 2, 5]]),
    ]
    groups = group_rows(rows, PAGE, True, CPU)
    assert [group.slots for group in groups] == [slice(2, 5), slice(6, 7), slice(1, 2), slice(5, 6)]
    assert [group.new for group in groups] == [1, 1, 5, 9]
    assert [group.exact for group in groups] == [False, False, True, False]
    neighbours = groups[0]
    assert neighbours.tables[0].tolist() == [[3, 0], [0, 0], [7, 9]]
    assert neighbours.lengths.tolist() == [[0, 8], [0, 3], [2, 4]]
    assert neighbours.sealed[0].tolist() == [3]  # the first one's page is full
    assert groups[3].sealed[0].tolist() == [2, 5]
    assert not any(group.exact for group in group_rows(rows, PAGE, False, CPU))
    packed = torch.arange(18.0).view(1, 1, 18, 1)
    assert neighbours.pick(packed).flatten().tolist() == [6, 7, 0]
    assert groups[3].pick(packed).shape == (1, 1, 9, 1)
    output = torch.zeros(18, 1, 1)
    for group in groups:
        group.place(group.pick(packed), output)
    assert output.flatten().tolist() == packed.flatten().tolist()


def test_the_lowest_slot_is_taken() -> None:
    pages = OpenPages({0: layout()}, 3, CPU)
    assert [pages.take(name) for name in "abab"] == [0, 1, 0, 1]
    pages.give_back("a")
    pages.give_back("nobody")
    assert (pages.take("c"), pages.take("d"), pages.free) == (0, 2, 0)
    assert pages.nbytes == 3 * OpenPages.bytes_per_slot([layout()]) == 3 * 2 * 2 * PAGE * 16 * 4
    pages.tails[0][0][0] = 1
    pages.copy([0], [2])
    assert pages.tails[0][0].amax((1, 2, 3)).tolist() == [1, 0, 1]


class Config:
    """Windows in two of three layers."""

    layer_types = ("sliding_attention", "sliding_attention", "full_attention") * 4
    sliding_window = 32


def test_layers_of_both_kinds_share_blocks_of_one_size() -> None:
    places, windows = places_of(Config, {i: layout() for i in range(12)})
    assert windows == {"full_attention": 0, "sliding_attention": 32}
    assert [places[i] for i in (2, 5, 8, 11)] == [Place("full_attention", 0, n) for n in range(4)]
    windowed = [i for i in range(12) if i % 3 < 2]
    assert [places[i] for i in windowed] == [Place("sliding_attention", n // 4, n % 4) for n in range(8)]
