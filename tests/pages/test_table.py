"""What goes to the device when a page is sealed, and that nobody waits for it."""

from typing import Any

import numpy as np
import pytest
import torch

from kvquant_hf.pages.pool import PagePool
from kvquant_hf.pages.store import PagedStore
from kvquant_hf.pages.table import PageTable, to_device
from kvquant_hf.triton_kernels.codecs import CODECS


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is asked of tensors on their way to a device, which is not there."""
    asked: list[Any] = []

    def pin_memory(self: torch.Tensor) -> torch.Tensor:
        asked.append("page-locked")
        return self.clone()

    def to(self: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        asked.append((device.type, non_blocking))
        return self

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    return asked


def test_page_ids_go_to_a_gpu_without_waiting(copies: list[Any]) -> None:
    pool = PagePool([(torch.uint8, (2, 16))], torch.device("cpu"))
    table = PageTable(pool, 2, torch.device("cuda"))
    pages = table.take(3)
    sent = table.followed_by(pages)
    assert sent.tolist() == [[0, 1, 2], [3, 4, 5]] and copies == ["page-locked", ("cuda", True)]
    table.append(pages, None, sent)
    table.keep(0, 2)
    copies.clear()
    assert table.on_device.tolist() == [[0, 1], [3, 4]] and copies == ["page-locked", ("cuda", True)]


def test_lengths_too(copies: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    like = torch.zeros(2, 1, 5, 16)
    store = PagedStore(CODECS["exact"], CODECS["exact"], 16, like, like)
    store.append(like, like)
    monkeypatch.setattr(PagedStore, "device", torch.device("cuda"))
    store._lengths = None
    assert store.lengths.tolist() == [[0, 5], [0, 5]] and copies == ["page-locked", ("cuda", True)]


def test_on_a_cpu_it_is_the_memory_itself(copies: list[Any]) -> None:
    numbers = np.arange(4, dtype=np.int32)
    assert to_device(numbers, torch.device("cpu")).data_ptr() == numbers.ctypes.data
    assert copies == [("cpu", False)]
