"""``Launcher``: the compiled kernel that was kept is started where Triton would have found it too, and only there."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from kvquant_hf.triton_kernels import launching  # noqa: E402
from kvquant_hf.triton_kernels.launching import Launcher  # noqa: E402

GRID = (4, 2, 1)
MEMORY = torch.zeros(64, dtype=torch.int8)
MISALIGNED = MEMORY[-MEMORY.data_ptr() % 16 + 8 :]
X = MISALIGNED[8:]


class Kernel:
    """What ``Launcher`` sees of a function under ``triton.jit`` that takes ``(x, (x, n), n, m)``."""

    def __init__(self, backend: str = "cuda") -> None:
        names = {"x": False, "planes": False, "special": False, "plain": True}
        self.params = [
            SimpleNamespace(name=name, is_constexpr=False, do_not_specialize=plain) for name, plain in names.items()
        ]
        self.params.append(SimpleNamespace(name="SIZE", is_constexpr=True, do_not_specialize=False))
        self.pre_run_hooks: list[Any] = []
        self.backend = backend
        self.compiled = 0  # calls that went the long way
        self.started: list[tuple[Any, ...]] = []  # and those that did not

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def call(*args: Any, SIZE: int, num_warps: int) -> Any:
            self.compiled += 1
            target = SimpleNamespace(backend=self.backend)
            return SimpleNamespace(
                run=lambda *given: self.started.append(given),
                function="function",
                packed_metadata="metadata",
                metadata=SimpleNamespace(target=target),
            )

        return call


@pytest.fixture(autouse=True)
def driver() -> Any:
    """One that says where we are."""
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(
        SimpleNamespace(get_current_device=lambda: 3, get_current_stream=lambda device: f"stream of {device}")
    )
    yield
    triton.runtime.driver.set_active(before)


def launcher(kernel: Kernel) -> Launcher:
    return Launcher(kernel, {"SIZE": 16, "num_warps": 1})


def test_the_second_time_it_is_started_at_once() -> None:
    kernel = Kernel()
    launch = launcher(kernel)
    args = (X, (X, 7), 7, 5)
    kept = launch(GRID, args)
    assert (kernel.compiled, kernel.started) == (1, [])
    for given in (None, kept):
        assert launch(GRID, args, given) == kept
    expected = (*GRID, "stream of 3", "function", "metadata", None, None, None, *args, 16)
    assert kernel.compiled == 1 and kernel.started == [expected] * 2


@pytest.mark.parametrize(
    ("args", "anew"),
    [
        ((X, (X, 7), 7, 6), False),  # a number that nothing was assumed of
        ((X, (X, 7), 7, 16), False),
        ((X, (X, 7), 7, 1 << 31), True),  # one that takes 64 bits
        ((X, (X, 7), 16, 5), True),
        ((X, (X, 1), 7, 5), True),
        ((X[16:], (X, 7), 7, 5), False),
        ((MISALIGNED, (X, 7), 7, 5), True),
        ((X, (MISALIGNED, 7), 7, 5), True),
    ],
    ids=["plain", "plain-16", "plain-64-bit", "special-16", "member-1", "aligned", "misaligned", "misaligned-member"],
)
def test_what_is_another_kernel(args: tuple[Any, ...], anew: bool) -> None:
    kernel = Kernel()
    launch = launcher(kernel)
    launch(GRID, (X, (X, 7), 7, 5))
    for _ in range(2):
        launch(GRID, args)
    assert (kernel.compiled, len(kernel.started)) == ((2, 1) if anew else (1, 2))


def test_which_tensor_is_misaligned_matters() -> None:
    kernel = Kernel()
    launch = launcher(kernel)
    for args in ((MISALIGNED, (X, 7), 7, 5), (X, (MISALIGNED, 7), 7, 5)):
        launch(GRID, args)
    assert kernel.compiled == 2


def test_whoever_watches_sees_every_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks of Triton and of a kernel, and another ``launch``."""
    kernel = Kernel()
    launch, args = launcher(kernel), (X, (X, 7), 7, 5)
    kept = launch(GRID, args)
    chain = triton.knobs.runtime.launch_enter_hook
    chain.add(print)
    assert launch(GRID, args, kept) is None and kernel.compiled == 2
    chain.remove(print)
    kernel.pre_run_hooks.append(print)
    assert launch(GRID, args, kept) is None and kernel.compiled == 3
    kernel.pre_run_hooks.clear()
    seen: list[Any] = []
    monkeypatch.setattr(
        launching, "launch", lambda kernel, grid, *args, **constants: seen.append((grid, args, constants))
    )
    launch(GRID, args, kept)
    assert seen == [(GRID, args, {"SIZE": 16, "num_warps": 1})] and kernel.compiled == 3 and not kernel.started


def test_other_gpus_go_the_long_way() -> None:
    """Triton assumes more of pointers on AMD GPUs than is looked at here."""
    kernel = Kernel("hip")
    launch = launcher(kernel)
    for _ in range(3):
        assert launch(GRID, (X, (X, 7), 7, 5)) is None
    assert kernel.compiled == 3


def test_variants_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_MOST_VARIANTS", 4)
    launch = launcher(Kernel())
    for number in range(20):
        launch(GRID, (X, (X, 7), number, 5))
    assert len(launch._variants) <= 4
