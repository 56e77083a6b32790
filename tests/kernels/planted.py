"""Faults put into a codec and into compiled kernels on purpose, and what the PTX machine says of them."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from kernels import compiled, test_decode
from kernels.compiled import CPU, Pair
from kernels.ptx_machine import Machine

from kvquant_hf.triton_kernels.codecs import CODECS
from kvquant_hf.triton_kernels.codecs.jit import KernelCodec
from kvquant_hf.triton_kernels.codecs.lmdeploy_token import TokenZeroPointCodec

BARRIER = r"bar\.sync"
WAIT = r"cp\.async\.wait_(?:group|all)"


class Edited(Machine):
    """Runs ``edit(text, arguments)`` in place of the kernel called ``name``; ``text`` is what came."""

    def __init__(self, name: str, edit: Callable[[str, Sequence[Any]], str]) -> None:
        super().__init__()
        self.name, self.edit, self.text = name, edit, ""

    def launch(self, text: str, shared_bytes: int, grid: Sequence[int], arguments: Sequence[Any]) -> None:
        if f".entry {self.name}(" in text:
            self.text = text
            text = self.edit(text, arguments)
        super().launch(text, shared_bytes, grid, arguments)


class _WithoutFlag(TokenZeroPointCodec):
    """Does not say that its codes are integers, for which PTX gives subnormals."""

    @property
    def kernel(self) -> KernelCodec:
        return dataclasses.replace(super().kernel, integer_codes=False)


def without_integer_codes(case: test_decode.Case, arch: int) -> None:
    """``check_attention`` of int8-token, built without the flag."""
    codec = CODECS["int8-token"]
    fields = {field.name: getattr(codec, field.name) for field in dataclasses.fields(codec)}
    name = "int8-token-without-flag"  # launchers may keep what they know of a codec by its name
    with mock.patch.dict(CODECS, {name: _WithoutFlag(**(fields | {"name": name}))}):
        compiled.check_attention((name, name), case, arch)


def _without(opcode: str, number: int | None) -> Callable[[str, Sequence[Any]], str]:
    """An edit that takes the instruction out that is the ``number``-th of ``opcode``."""

    def edit(text: str, arguments: Sequence[Any]) -> str:
        places = [match.span() for match in re.finditer(rf"^\s*(?:{opcode})\b.*;", text, re.MULTILINE)]
        if number is None:
            return text
        start, end = places[number]
        return text[:start] + text[end:]

    return edit


def found_without(opcode: str, kernel: str, run: Callable[..., None], *args: Any) -> list[set[str]]:
    """What the machine finds in ``run(machine, *args)`` if it takes each ``opcode`` out of ``kernel`` in turn."""
    whole = Edited(kernel, _without(opcode, None))
    run(whole, *args)
    whole.check()
    found = []
    for number in range(len(re.findall(rf"^\s*(?:{opcode})\b", whole.text, re.MULTILINE))):
        machine = Edited(kernel, _without(opcode, number))
        with contextlib.suppress(AssertionError):  # of wrong results, which are no matter here
            run(machine, *args)
        found.append(machine.kinds)
    return found


def attend(machine: Machine, pair: Pair, case: test_decode.Case, arch: int) -> None:
    test_decode.check(pair, case, CPU, compiled.attend_on(machine, arch))


def append(machine: Machine, pair: Pair, arch: int) -> None:
    compiled.append_and_compare(machine, pair, 65, (0, 63), (64, 64), torch.bfloat16, arch)


def found_one_page_too_far(pair: Pair, case: test_decode.Case, arch: int) -> set[str]:
    """What the machine finds where ``decode`` reads codes of keys one page behind where they are."""

    def edit(text: str, arguments: Sequence[Any]) -> str:
        number, codes = next((i, a) for i, a in enumerate(arguments) if getattr(a, "dtype", None) == torch.uint8)
        load = rf"ld\.param\.b64\s+(\S+), \[_decode_kernel_param_{number}\];"
        edited, count = re.subn(load, rf"\g<0>\nadd.s64 \1, \1, {codes[0].nbytes};", text)
        assert count, "the kernel does not load the address of the codes"
        return edited

    machine = Edited("_decode_kernel", edit)
    with contextlib.suppress(AssertionError):
        attend(machine, pair, case, arch)
    return machine.kinds
