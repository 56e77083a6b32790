"""How many programs a multiprocessor holds, on every GPU of the table."""

from types import SimpleNamespace

import pytest
import torch

from kvquant_hf.triton_kernels import plan as plans
from kvquant_hf.triton_kernels.codecs import CODECS
from kvquant_hf.triton_kernels.launch import LAUNCH_TABLE, LaunchConfig, override_launch
from kvquant_hf.triton_kernels.occupancy import MULTIPROCESSORS, Multiprocessor, multiprocessor, residents
from kvquant_hf.triton_kernels.pages import PagedSide

SMALL = ("sm_86", "sm_89", "sm_120")  # 100 KB of shared memory


@pytest.mark.parametrize("name", MULTIPROCESSORS)
def test_what_shared_memory_leaves(name: str) -> None:
    """Pages in 16 bits (34 KB), packed ones (18 KB) and half of that, one warp of 255 registers."""
    held = [residents(MULTIPROCESSORS[name], shared << 10, 1, 255) for shared in (34, 18, 9)]
    expected = {"sm_75": [1, 3, 7], "sm_70": [2, 5, 8], "sm_80": [4, 8, 8], "sm_87": [4, 8, 8]}
    assert held == ([2, 5, 8] if name in SMALL else expected.get(name, [6, 8, 8]))


# Registers of a thread: programs of one warp and of four.  A quarter of a multiprocessor's registers is for a quarter
# of its warps, and 32 programs are the most.
HELD = {32: (32, 16), 64: (32, 8), 80: (24, 6), 128: (16, 4), 168: (12, 3), 169: (8, 2), 255: (8, 2)}


@pytest.mark.parametrize("registers", HELD)
def test_what_registers_leave(registers: int) -> None:
    assert tuple(residents(MULTIPROCESSORS["sm_90"], 0, warps, registers) for warps in (1, 4)) == HELD[registers]


def test_what_threads_leave() -> None:
    assert residents(MULTIPROCESSORS["sm_75"], 0, 8, 16) == 4
    assert residents(MULTIPROCESSORS["sm_89"], 0, 8, 16) == 6
    assert residents(MULTIPROCESSORS["sm_90"], 1 << 20, 1, 32) == 1, "one runs, or the launch fails and says so"


def test_the_launch_table_counts_registers() -> None:
    """Its residents are at most what a thread with all registers leaves."""
    for row in LAUNCH_TABLE:
        if not row.architecture.startswith("gfx"):
            assert row.config.residents <= residents(MULTIPROCESSORS["sm_90"], 0, row.config.warps, 255)
    assert LaunchConfig().residents == 8


def test_the_device_is_asked_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        shared_memory_per_multiprocessor = 123 << 10
        max_threads_per_multi_processor = 1536
        regs_per_multiprocessor = 32768

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    gpu = torch.device("cuda", 1)
    asked = (123 << 10, 32768, 1536)
    assert multiprocessor("sm_90", gpu) == Multiprocessor(*asked, 32, 1 << 10)
    assert multiprocessor("sm_89", gpu) == Multiprocessor(*asked, 24, 1 << 10)
    assert multiprocessor("sm_999", gpu) == Multiprocessor(*asked)
    assert multiprocessor("gfx942", gpu) is None
    for architecture in ("cpu", "gfx942", "sm_999"):
        assert multiprocessor(architecture, torch.device("cpu")) is None
    assert multiprocessor("sm_90", torch.device("meta")) == MULTIPROCESSORS["sm_90"]


@pytest.mark.parametrize(("architecture", "held"), [("sm_90", 6), ("sm_80", 4), ("sm_89", 2)])
def test_a_plan_counts_what_was_compiled(architecture: str, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """34 KB of shared memory leave fewer programs than the launch table's 8, and splits fill those."""
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(plans, "architecture", lambda device: architecture)
    monkeypatch.setattr(plans, "processors", lambda device: 100)
    compiled = SimpleNamespace(metadata=SimpleNamespace(shared=34 << 10))
    monkeypatch.setattr(plans.Launcher, "compile", lambda self, *args: compiled)
    plans._attention_plan.cache_clear()
    plans._attention_kernels.cache_clear()

    def plan() -> plans.AttentionPlan:
        def meta(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.float16, device="meta")

        pages = PagedSide(CODECS["exact"], (meta(1, 8, 64, 128),), meta(1, 8, 64, 128), 64)
        made = plans.attention_plan(meta(1, 32, 1, 128), pages, pages, meta(1, 4096), None, True, 0, False, None)
        made.settle(())
        return made

    asked = []
    monkeypatch.setattr(plans, "split_count", lambda config, *others: asked.append(config.residents) or 1)
    plan()
    with override_launch(residents=3):
        plan()
    plans._attention_plan.cache_clear()
    plans._attention_kernels.cache_clear()
    assert asked == [held, 3]
