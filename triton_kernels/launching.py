"""The one way from here to Triton: ``launch``, and ``Launcher``, which makes it cheap for constants that stay.

Triton's own call (``kernel[grid](...)``) binds all arguments, asks each what the compiler may assume of it, and looks
the compiled kernel up by a string made of all of that and the constants.  A ``Launcher`` is made once for one call site
and its constants, and keeps the compiled kernel by the little that can still differ:

    pointers                 whether they are aligned to 16 bytes
    specialized integers     themselves (Triton asks whether they are 1 and whether 16 divides them)
    other integers           whether they fit in 32 bits

and hands it to the driver as Triton does.  Where that is not known to be all (AMD GPUs, the interpreter, hooks such as
profilers set), and wherever somebody has put another function in the place of ``launch``, calls go the long way.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import itemgetter, or_
from typing import Any

import torch

from .target import triton

_ADDRESS = torch.Tensor.data_ptr
_INT32 = (1 << 31) - 1
_MOST_VARIANTS = 512  # of one launcher: strides of prompts of any length must not pile up


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> Any:
    """Launch ``kernel``, a function under ``triton.jit``, on the current device.

    Tests put another function in its place (``launching.launch``), which then sees every launch that there is.

    Args:
        grid: numbers of programs, up to three.
        args: what is no ``tl.constexpr``, in the kernel's order: tensors, numbers and tuples of these.
        constants: the kernel's ``tl.constexpr``, and Triton's options (``num_warps`` and others).

    Returns:
        What Triton compiled; nothing that is of use under the interpreter.
    """
    return kernel[grid](*args, **constants)


_launch = launch
# How a compiled kernel is started: the driver's function, handle and metadata; the constants, which it passes over; who
# says on which stream, and the device.
Variant = tuple[Any, Any, Any, tuple[Any, ...], Callable[[Any], Any], Any]


class Launcher:
    """``launch`` of one kernel with given constants, on one device.

    What stands at one place of ``args`` has one type in all calls, and a tensor one dtype.

    Args:
        kernel: a function under ``triton.jit``, its ``tl.constexpr`` behind all other parameters.
        constants: as of ``launch``.
    """

    def __init__(self, kernel: Any, constants: Mapping[str, Any]) -> None:
        self.kernel, self.constants = kernel, dict(constants)
        self._hooks: list[Any] = getattr(kernel, "pre_run_hooks", [])
        self._variants: dict[object, Variant] = {}
        self._key: Callable[[tuple[Any, ...]], object] | None = None

    def __call__(
        self, grid: tuple[int, int, int], args: tuple[Any, ...], kept: Variant | None = None, direct: bool | None = None
    ) -> Variant | None:
        """Launch.

        Args:
            grid, args: as of ``launch``.
            direct: what ``nobody_watches`` has just said, if somebody has asked it.
            kept: what an earlier call returned whose integers were the same, and all whose pointers were aligned, or
                not, like those of this one; it saves looking at them.

        Returns:
            What may be kept, or None.
        """
        if not (nobody_watches() if direct is None else direct) or self._hooks:
            launch(self.kernel, grid, *args, **self.constants)
            return None
        if kept is None:
            key = None if self._key is None else self._key(args)
            kept = self._variants.get(key)
            if kept is None:
                return self._keep(launch(self.kernel, grid, *args, **self.constants), args)
        run, function, metadata, constants, stream_of, device = kept
        run(*grid, stream_of(device), function, metadata, None, None, None, *args, *constants)
        return kept

    def compile(self, *args: Any) -> Any:
        """What Triton makes of the kernel for ``args``, not launched; None under the interpreter."""
        if not hasattr(self.kernel, "device_caches"):
            return None
        return self.kernel.run(*args, grid=(1, 1, 1), warmup=True, **self.constants)

    def _keep(self, compiled: Any, args: tuple[Any, ...]) -> Variant | None:
        """After a launch with ``args``: what it was compiled to, where it is known what that depends on."""
        if not hasattr(compiled, "packed_metadata") or compiled.metadata.target.backend != "cuda":
            return None
        parameters = self.kernel.params
        if self._key is None:
            self._key = _key_of(args, [parameter.do_not_specialize for parameter in parameters])
        if len(self._variants) >= _MOST_VARIANTS:
            self._variants.clear()
        constants = tuple(self.constants[parameter.name] for parameter in parameters if parameter.is_constexpr)
        driver = triton.runtime.driver.active
        stream_of, device = driver.get_current_stream, driver.get_current_device()
        variant = (compiled.run, compiled.function, compiled.packed_metadata, constants, stream_of, device)
        self._variants[self._key(args)] = variant
        return variant


def aligned(*tensors: torch.Tensor) -> bool:
    """Whether all begin at multiples of 16 bytes."""
    return reduce(or_, map(_ADDRESS, tensors)) & 15 == 0


def nobody_watches() -> bool:
    """Whether nobody wants to see launches: neither by ``launch`` nor by hooks, which Triton calls."""
    if launch is not _launch:
        return False
    hooks = triton.knobs.runtime
    enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
    return not (getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _key_of(args: Sequence[Any], plain: Sequence[bool]) -> Callable[[tuple[Any, ...]], object]:
    """What finds the compiled kernel for arguments like ``args``; ``plain``: which parameters are not specialized."""
    places = list(enumerate(args))
    tensors = _picked([i for i, x in places if isinstance(x, torch.Tensor)])
    tuples = [(i, sum(isinstance(y, torch.Tensor) for y in x)) for i, x in places if isinstance(x, tuple)]
    numbers = [i for i, x in places if isinstance(x, int)]
    special, others = _picked([i for i in numbers if not plain[i]]), _picked([i for i in numbers if plain[i]])

    def key(args: tuple[Any, ...]) -> object:
        pointers, within, wide = tensors(args), special(args), others(args)
        for place, count in tuples:  # tensors come first in them
            pointers += args[place][:count]
            within += args[place][count:]
        return (
            within,
            aligned(*pointers) or tuple([_ADDRESS(x) & 15 == 0 for x in pointers]),
            wide if max(wide, default=0) > _INT32 else None,
        )

    return key


def _picked(places: list[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """A function that takes what is at ``places`` out of a tuple."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda args: tuple(args[i] for i in places)
