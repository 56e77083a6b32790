"""How kernels are launched: row blocks, warps, stages and splits, from a literal table.

Nothing is tuned at the first call: a table row answers, and ``override_launch`` replaces it for tests and tuning.

What the rows follow from (registers and spills of every row: ``docs/kernels.md``; none is timed on a GPU yet):

* A program works on one page of one head at a time.  With one warp it needs no barrier and passes nothing through
  shared memory but the page itself; scores, weights and codes stay in registers.  A page of 64 x 128 elements then
  fills the register file of a thread (up to 255), so 8 programs of one warp are on a multiprocessor at once.  Twice the
  elements take two warps.
* Eight rows are the least that a tensor core takes.  A block of 16 costs as many instructions per row and half the
  traffic to the second-level cache, so that is for chunks of queries; for codes of few bits the look-up fills the
  registers, and the traffic is small, so eight rows stay.
* Three stages are two buffers: the next page is copied while one is worked on.  8 programs x a page of 9 to 17 KB in
  flight are several times what bandwidth x latency of an H100 asks of a multiprocessor, so more buffers give nothing.
* Where products run without tensor cores (float32 models; GPUs before sm_80, by Triton's choice) registers decide:
  eight warps and no pipelining.  AMD's matrix cores take 16 rows at least, and their waves have 64 threads.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchConfig:
    """Launch parameters of the attention kernel.

    Args:
        rows: rows (query heads of a group times queries) of one program; a power of two.
        warps: warps of one program.
        stages: software-pipelining depth of the loop over pages.  1 copies a page and waits for it; 2 copies the next
            page at the end of the work on one, into the same buffer; 3 during that work, into a second buffer.
        masked_warps: warps where there is a mask, if that differs, else 0.
        residents: programs that a multiprocessor holds at once at most, by the registers of a thread; shared memory
            may allow fewer (``occupancy.py``), and the choice of splits fills them.
        registers: what a thread may have at most (Triton's ``maxnreg``); 0: the assembler is not told.
    """

    rows: int = 8
    warps: int = 1
    stages: int = 3
    residents: int = 8
    masked_warps: int = 0
    registers: int = 0

    def masked(self) -> "LaunchConfig":
        """The configuration where there is a mask: as many warps in all on a multiprocessor."""
        if not self.masked_warps:
            return self
        residents = max(1, self.residents * self.warps // self.masked_warps)
        return dataclasses.replace(self, warps=self.masked_warps, residents=residents)

    def ordered(self, architecture: str) -> "LaunchConfig":
        """The configuration where keys are in an order of each page.

        On some GPUs the assembler then takes 168 registers and 8 bytes of stack, for more programs on a multiprocessor
        than ``residents``, which are all that are launched.  Told that a thread may have 255, it takes neither.
        """
        return dataclasses.replace(self, registers=255) if architecture in _TOLD else self


@dataclass(frozen=True)
class LaunchRow:
    """A table row answers for an architecture (prefix), model elements of at least ``itemsize`` bytes, pages of up to
    ``elements`` (tokens x head_dim), at least ``rows`` query rows, and codes of up to ``bits`` bits in up to ``planes``
    planes, both of keys plus values."""

    architecture: str
    itemsize: int
    elements: int
    rows: int
    bits: int
    planes: int
    config: LaunchConfig


_TOLD = "sm_80", "sm_120"
_ANY = 1 << 30
LAUNCH_TABLE: tuple[LaunchRow, ...] = (
    # The first row that fits wins.
    LaunchRow("sm_7", 0, _ANY, 0, _ANY, _ANY, LaunchConfig(rows=8, warps=8, stages=1, residents=1)),
    LaunchRow("", 4, _ANY, 0, _ANY, _ANY, LaunchConfig(rows=8, warps=8, stages=1, residents=1)),
    LaunchRow("gfx", 0, 64 * 128, 0, _ANY, _ANY, LaunchConfig(rows=16, warps=2, stages=2, residents=4)),
    LaunchRow("gfx", 0, _ANY, 0, _ANY, _ANY, LaunchConfig(rows=16, warps=4, stages=2, residents=2)),
    # The same code takes a few registers more there than it has, with a mask also where codes have more bits.
    LaunchRow("sm_1", 0, 64 * 128, 0, 6, 2, LaunchConfig(rows=8, warps=2, stages=3, residents=4)),
    LaunchRow("", 0, 64 * 128, 0, 6, 2, LaunchConfig(rows=8, warps=1, stages=3, residents=8)),
    # 16 rows of int8 take a register more than sm_80 has, and so do two warps for twice the elements, further below.
    LaunchRow("sm_80", 0, 64 * 128, 9, 16, 2, LaunchConfig(rows=8, warps=1, stages=3, residents=8)),
    LaunchRow("", 0, 64 * 128, 9, _ANY, 2, LaunchConfig(rows=16, warps=2, stages=3, residents=4)),
    LaunchRow("sm_12", 0, 64 * 128, 0, 16, 2, LaunchConfig(rows=8, warps=1, stages=3, residents=8, masked_warps=2)),
    LaunchRow("sm_12", 0, 64 * 128, 0, _ANY, 2, LaunchConfig(rows=8, warps=2, stages=3, residents=4)),
    LaunchRow("sm_1", 0, 64 * 128, 0, _ANY, 2, LaunchConfig(rows=8, warps=1, stages=3, residents=8, masked_warps=2)),
    LaunchRow("", 0, 64 * 128, 0, _ANY, 2, LaunchConfig(rows=8, warps=1, stages=3, residents=8)),
    # Codes in two planes on either side.  More warps would unpack the same values again: the words of a token fill one
    # tile of a tensor core.  Between head_dim 64 and 96, copying a page ahead takes about a fifth of the loop.
    LaunchRow("", 0, 64 * 64, 0, _ANY, _ANY, LaunchConfig(rows=8, warps=1, stages=2, residents=8)),
    LaunchRow("", 0, 64 * 80, 0, _ANY, _ANY, LaunchConfig(rows=8, warps=1, stages=1, residents=8)),
    LaunchRow("", 0, 64 * 128, 0, _ANY, _ANY, LaunchConfig(rows=8, warps=1, stages=2, residents=8)),
    LaunchRow("", 0, 64 * 256, 9, 6, 2, LaunchConfig(rows=8, warps=4, stages=3, residents=2)),
    LaunchRow("sm_1", 0, 64 * 256, 0, 6, 2, LaunchConfig(rows=8, warps=4, stages=3, residents=2)),
    # Look-up tables and a page ahead do not fit in the registers of two warps together on some.
    LaunchRow("", 0, 64 * 192, 0, 6, 2, LaunchConfig(rows=8, warps=2, stages=3, residents=4)),
    LaunchRow("sm_80", 0, 64 * 256, 0, 6, 2, LaunchConfig(rows=8, warps=4, stages=3, residents=2)),
    LaunchRow("sm_90", 0, 64 * 256, 0, 6, 2, LaunchConfig(rows=8, warps=4, stages=3, residents=2)),
    LaunchRow("", 0, 64 * 256, 0, 6, 2, LaunchConfig(rows=8, warps=2, stages=3, residents=4)),
    LaunchRow("", 0, 64 * 256, 9, 16, 2, LaunchConfig(rows=16, warps=4, stages=3, residents=2)),
    LaunchRow("sm_80", 0, 64 * 256, 0, 16, 2, LaunchConfig(rows=8, warps=4, stages=3, residents=2)),
    LaunchRow("", 0, 64 * 256, 0, 16, 2, LaunchConfig(rows=8, warps=2, stages=3, residents=4)),
    # Exact pages.  Two of this size do not fit in 99 KiB of shared memory.
    LaunchRow("sm_86", 0, _ANY, 0, _ANY, 2, LaunchConfig(rows=8, warps=4, stages=2, residents=1)),
    LaunchRow("sm_89", 0, _ANY, 0, _ANY, 2, LaunchConfig(rows=8, warps=4, stages=2, residents=1)),
    LaunchRow("sm_12", 0, _ANY, 0, _ANY, 2, LaunchConfig(rows=8, warps=4, stages=2, residents=1)),
    LaunchRow("", 0, 64 * 256, 9, _ANY, 2, LaunchConfig(rows=16, warps=4, stages=3, residents=2)),
    LaunchRow("", 0, _ANY, 0, _ANY, 2, LaunchConfig(rows=8, warps=4, stages=3, residents=2)),
    LaunchRow("", 0, _ANY, 0, _ANY, _ANY, LaunchConfig(rows=8, warps=2, stages=2, residents=4)),
)

MAX_SPLITS = 160
# What a program costs besides its pages, in pages: reading its queries, writing and merging its accumulator.
PROGRAM_COST = 1
# What the open page takes, in packed pages: it is read in two parts, one after the other, each waited for.
OPEN_COST = 2
# What fewer splits, and so less to merge, may cost.
TOLERANCE = 0.03

_override: dict[str, int] = {}


@contextlib.contextmanager
def override_launch(**values: int) -> Iterator[None]:
    """Replace fields of every ``LaunchConfig`` inside the ``with`` block; ``splits=n`` fixes the number of splits."""
    unknown = values.keys() - {field.name for field in dataclasses.fields(LaunchConfig)} - {"splits"}
    if unknown:
        raise TypeError(f"override_launch takes fields of LaunchConfig and splits, not {', '.join(sorted(unknown))}")
    before = dict(_override)
    _override.update(values)
    try:
        yield
    finally:
        _override.clear()
        _override.update(before)


def overridden() -> tuple[tuple[str, int], ...]:
    """What ``override_launch`` replaces at present."""
    return tuple(_override.items()) if _override else ()


def launch_row(architecture: str, itemsize: int, elements: int, rows: int, bits: int, planes: int = 2) -> LaunchRow:
    """The table's first row that fits; arguments as in ``launch_config``."""
    for row in LAUNCH_TABLE:
        fits = architecture.startswith(row.architecture) and itemsize >= row.itemsize and elements <= row.elements
        if fits and rows >= row.rows and bits <= row.bits and planes <= row.planes:
            return row
    raise AssertionError("the last row of LAUNCH_TABLE fits everything")


def launch_config(
    architecture: str, itemsize: int, elements: int, rows: int, bits: int, planes: int = 2
) -> LaunchConfig:
    """How to launch.

    Args:
        architecture: ``"sm_90"``, ``"gfx942"``, or ``"cpu"`` under the interpreter.
        itemsize: bytes of an element in the model's dtype.
        elements: tokens of a page times the larger head_dim.
        rows: query heads per key/value head times queries.
        bits: bits of a code, keys plus values.
        planes: planes that codes are unpacked from, keys plus values (``KernelCodec.code_planes``).
    """
    fields = {name: value for name, value in _override.items() if name != "splits"}
    if "warps" in fields:
        fields.setdefault("masked_warps", 0)  # the warps that were asked for, mask or not
    return dataclasses.replace(launch_row(architecture, itemsize, elements, rows, bits, planes).config, **fields)


def split_count(config: LaunchConfig, programs: int, pages: int, processors: int) -> int:
    """Splits of the pages, each but the last of as many pages; the last one has the open page too.

    Programs run in waves of what the device holds, and a wave takes as long as one program: the choice is the fewest
    splits whose waves x (pages of a split + ``PROGRAM_COST``) is the least, or close to it.

    Args:
        config: its ``residents`` is what a multiprocessor holds.
        programs: programs of one split (batch x heads x row blocks).
        pages: pages of the longest sequence.
        processors: multiprocessors of the device.
    """
    if "splits" in _override:
        return max(1, min(_override["splits"], max(pages, 1)))
    return _fastest_splits(programs, pages, processors * config.residents)


@functools.lru_cache(maxsize=4096)
def _fastest_splits(programs: int, pages: int, held: int) -> int:
    def cost(splits: int) -> int:
        waves = -(-programs * splits // held)
        return waves * (-(-(pages + OPEN_COST) // splits) + PROGRAM_COST)

    choices = range(1, min(pages + 1, MAX_SPLITS) + 1)
    enough = min(map(cost, choices)) * (1 + TOLERANCE)
    splits = next(n for n in choices if cost(n) <= enough)
    each = -(-(pages + OPEN_COST) // splits)
    return -(-(pages + OPEN_COST) // each)
