"""Pages in the CPU's memory that visit the device one layer at a time.

    layer            0         1         2         3         0 ...
    compute stream   [ attend ][ attend ][ attend ][ attend ]
    copy stream      [ bring 1 ][ bring 2 ][ bring 3 ][ bring 0 ]
    leaves                     0         1         2

A sealed page never changes, so the copy on the CPU stays good while the page visits: bringing a layer is one copy of
its pages to the device, and leaving writes only the pages sealed meanwhile.  Open pages and page tables, which do not
grow with the context or hardly, stay on the device.

Order between the streams, which is all that correctness rests on:

* before the copy stream allocates or reads anything, it waits for all that the compute stream was given so far.  The
  compute stream writes the CPU's copy and is the last reader of the memory that leaves, so neither the copy's source
  nor memory that is used again can be in use.  (That is also why planes that leave need no ``record_stream``, which
  would keep their memory until the device has caught up with the host: the pages of many layers at once.)
* before anything reads planes that were brought, its stream waits for the copy stream.  A stream other than the one
  that the copy stream waited for is recorded on the planes.
* before pages are written to the CPU, the compute stream waits for the streams of other threads that filled some.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

_CPU = torch.device("cpu")


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream per device that pages are brought on."""
    return torch.cuda.Stream(device)


class HostCopy:
    """The pages of one pool in the CPU's memory, page-locked where CUDA is, and whether they are on the device too.

    On devices without CUDA streams the same copies run one after the other.

    Args:
        device: where the pages are worked on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.planes: list[torch.Tensor] = []
        self.away = False  # whether the planes have left the device
        self.streams = device.type == "cuda"
        self._unsaved: list[np.ndarray] = []  # pages that the CPU does not have yet
        self._writers: set[torch.cuda.Stream] = set()  # streams that write them
        self._saved: torch.cuda.Event | None = None  # the CPU's copy is complete
        self._brought: torch.cuda.Event | None = None  # the planes have arrived
        self._consumer: torch.cuda.Stream | None = None  # what the copy stream waited for

    @staticmethod
    def helps(device: torch.device) -> bool:
        """Whether ``device`` has a memory of its own."""
        return device.type not in ("cpu", "meta")

    @property
    def nbytes(self) -> int:
        """Bytes in the CPU's memory."""
        return sum(plane.untyped_storage().nbytes() for plane in self.planes)

    def written(self, pages: np.ndarray) -> None:
        """``pages`` are about to be written on the device, by the current stream."""
        self._unsaved.append(pages)
        if self.streams:
            self._writers.add(torch.cuda.current_stream(self.device))

    def leave(self, planes: list[torch.Tensor], capacity: int) -> list[torch.Tensor]:
        """Complete the CPU's copy of ``planes`` and return what is left on the device: nothing."""
        if self.away or capacity == 0:
            return planes
        with torch.inference_mode(False), torch.no_grad():
            # What was brought for nothing is awaited too: its memory must not be used again before it is there.
            self._save(self.arrived(planes), capacity)
        return []

    def _save(self, planes: list[torch.Tensor], capacity: int) -> None:
        if self.streams:
            current = torch.cuda.current_stream(self.device)
            for writer in self._writers - {current}:
                current.wait_stream(writer)
        if not self.planes or self.planes[0].shape[0] != capacity:
            # The pool has grown: new memory for all of it, rather than waiting for the old to be read.
            pinned = torch.cuda.is_available()
            self.planes = [torch.empty(p.shape, dtype=p.dtype, device=_CPU, pin_memory=pinned) for p in planes]
            runs = [slice(0, capacity)]
        else:
            runs = _runs(self._unsaved)
        for host, plane in zip(self.planes, planes, strict=True):
            for run in runs:
                host[run].copy_(plane[run], non_blocking=self.streams)
        if self.streams:
            self._saved, self._brought = current.record_event(), None
        self._unsaved, self._writers, self.away = [], set(), True

    def complete(self) -> list[torch.Tensor]:
        """The CPU's copy of planes that are away, once it is there."""
        if self._saved is not None:
            self._saved.synchronize()
        return self.planes

    def begin(self, planes: list[torch.Tensor]) -> list[torch.Tensor]:
        """Start to bring the pages to the device and return the planes, to be read after :meth:`arrived`."""
        if not self.away:
            return planes
        if self.streams:
            stream, self._consumer = _copy_stream(self.device), torch.cuda.current_stream(self.device)
            stream.wait_stream(self._consumer)
            if self._saved is not None:  # by another thread's stream, perhaps
                stream.wait_event(self._saved)
            with torch.cuda.stream(stream):
                planes = self._bring()
                self._brought = stream.record_event()
        else:
            planes = self._bring()
        self.away = False
        return planes

    def arrived(self, planes: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return planes that may be read now, bringing them if nobody has."""
        planes = self.begin(planes)
        if self._brought is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(self._brought)
            if current != self._consumer:
                for plane in planes:
                    plane.record_stream(current)
        return planes

    def _bring(self) -> list[torch.Tensor]:
        with torch.inference_mode(False):  # so that they can be written later, whatever the caller's mode is now
            return [plane.to(self.device, non_blocking=self.streams, copy=True) for plane in self.planes]


def _runs(pages: Sequence[np.ndarray]) -> list[slice]:
    """Consecutive pages as slices: a slice of page-locked memory is copied without waiting, a selection is not."""
    if not pages:
        return []
    ids = np.unique(np.concatenate(pages))
    runs = np.split(ids, np.flatnonzero(np.diff(ids) > 1) + 1)
    return [slice(int(run[0]), int(run[-1]) + 1) for run in runs if run.size]
