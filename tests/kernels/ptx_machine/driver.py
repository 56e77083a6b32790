"""The machine as the GPU that Triton drives: what launchers launch is compiled for a target and run by the machine.

Triton asks its driver for the target to compile for, for what loads a compiled kernel, and for what launches one.  So
every launch comes here, whoever compiled or kept the kernel.  The "binary" of this GPU is the PTX itself; the assembler
does not run.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

from .machine import Machine


class _Utilities:
    """What Triton asks of a GPU when it loads a kernel."""

    @staticmethod
    def get_device_properties(device: object) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": 1}

    @staticmethod
    def load_binary(name: str, binary: bytes, shared: int, device: object) -> tuple[str, str, int, int, int]:
        """Module, function, registers, spills and most threads of a program."""
        return name, binary.decode(), 0, 0, 1024

    @staticmethod
    def unload_module(module: object) -> None:
        pass


class _Driver:
    """A GPU of ``sm_<arch>``, whose launches are those of ``machine``."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)
        self.utils = _Utilities()
        self.machine: Machine | None = None

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return f"PTX machine, {self.target}"

    def get_current_stream(self, device: object = None) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What launches a kernel, called with grid, stream, function, metadata, hooks and arguments."""
        kinds = list(source.signature.values())

        def launch(x: int, y: int, z: int, stream: int, text: str, *rest: Any) -> None:
            assert self.machine is not None, "launch inside of a block of running_on"
            _, _, _, _, *arguments = rest  # packed metadata, launch metadata, and two hooks
            values = [v for kind, value in zip(kinds, arguments, strict=True) for v in _flat(kind, value)]
            self.machine.launch(text, metadata.shared, (x, y, z), values)

        return launch


@functools.cache
def _driver(arch: int) -> _Driver:
    """One for a target: Triton keeps compiled kernels, and they their launcher."""
    return _Driver(arch)


def _flat(kind: Any, value: Any) -> Iterator[Any]:
    """Arguments that reach the kernel: members of tuples, and no constants."""
    if isinstance(kind, tuple):
        for one, part in zip(kind, value, strict=True):
            yield from _flat(one, part)
    elif kind != "constexpr":
        yield value


def _without_assembler(*arguments: Any) -> tuple[str, str] | None:
    """Hook of Triton's: without arguments it says how cached kernels differ, with them it changes how they are made."""
    if not arguments:
        return "ptx-machine", "ptx-machine"
    stages = arguments[1]
    stages["cubin"] = lambda source, metadata: source.encode()
    return None


@contextlib.contextmanager
def running_on(machine: Machine, arch: int) -> Iterator[None]:
    """Triton's launches on tensors of the CPU are compiled for ``sm_<arch>`` and run by ``machine``.

    What is allocated meanwhile and not filled may not be read before a kernel has written it.
    """
    import triton
    from triton import knobs

    def forbidden(allocate: Any) -> Any:
        @functools.wraps(allocate)
        def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor: torch.Tensor = allocate(*args, **kwargs)
            if tensor.device.type == "cpu":
                machine.forbid(tensor)
            return tensor

        return empty

    driver, before = _driver(arch), triton.runtime.driver._active
    allocators = [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]
    originals = [getattr(owner, name) for owner, name in allocators]
    with knobs.runtime.scope(), knobs.cache.scope():
        knobs.runtime.add_stages_inspection_hook = _without_assembler
        knobs.cache.dir = f"{knobs.cache.dir}/ptx"
        driver.machine = machine
        triton.runtime.driver.set_active(driver)
        for (owner, name), original in zip(allocators, originals, strict=True):
            setattr(owner, name, forbidden(original))
        try:
            yield
        finally:
            for (owner, name), original in zip(allocators, originals, strict=True):
                setattr(owner, name, original)
            triton.runtime.driver.set_active(before)
            driver.machine = None
