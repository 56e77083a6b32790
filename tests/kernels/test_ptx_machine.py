"""The PTX machine's instructions against their definitions in the PTX ISA, written down a second time and slowly."""

import math
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from kernels.ptx_machine import Machine, PtxError
from kernels.ptx_text import COUNT, check, differing, elementwise, floats, kernel, words


def towards_zero(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def field(a: int, position: int, length: int, bits: int = 32) -> int:
    return a >> position & ((1 << min(length, bits)) - 1) if position < bits else 0


def signed_field(a: int, position: int, length: int) -> int:
    """PTX ISA, ``bfe``: bits beyond the field are its highest bit, or that of ``a``."""
    sign = 0 if length == 0 else a >> min(position + length - 1, 31) & 1
    return sum((a >> (position + i) & 1 if i < length and position + i < 32 else sign) << i for i in range(32))


def inserted(a: int, b: int, position: int, length: int) -> int:
    for i in range(min(length, max(0, 32 - position))):
        b = b & ~(1 << (position + i)) | (a >> i & 1) << (position + i)
    return b


def permuted(a: int, b: int, selector: int) -> int:
    result = 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = (b << 32 | a) >> 8 * (nibble & 7) & 255
        result |= ((255 if byte & 128 else 0) if nibble & 8 else byte) << 8 * i
    return result


def by_table(table: int) -> Callable[[int, int, int], int]:
    return lambda a, b, c: sum(
        (table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i for i in range(32)
    )


INTEGERS = {
    "add.s32 %o, %a, %b;": ("s32 s32", "s32", operator.add),
    "sub.s64 %o, %a, %b;": ("s64 s64", "s64", operator.sub),
    "mul.lo.s32 %o, %a, %b;": ("s32 s32", "s32", operator.mul),
    "mul.hi.s32 %o, %a, %b;": ("s32 s32", "s32", lambda a, b: a * b >> 32),
    "mul.hi.u32 %o, %a, %b;": ("u32 u32", "u32", lambda a, b: a * b >> 32),
    "mul.wide.s32 %o, %a, %b;": ("s32 s32", "s64", operator.mul),
    "mul.wide.u16 %o, %a, %b;": ("u16 u16", "u32", operator.mul),
    "mad.lo.s32 %o, %a, %b, %c;": ("s32 s32 s32", "s32", lambda a, b, c: a * b + c),
    "mad.wide.u32 %o, %a, %b, %c;": ("u32 u32 u64", "u64", lambda a, b, c: a * b + c),
    "div.s32 %o, %a, %b;": ("s32 s32", "s32", towards_zero),
    "rem.s32 %o, %a, %b;": ("s32 s32", "s32", lambda a, b: a - b * towards_zero(a, b)),
    "div.u32 %o, %a, %b;": ("u32 u32", "u32", operator.floordiv),
    "min.s32 %o, %a, %b;": ("s32 s32", "s32", min),
    "max.u32 %o, %a, %b;": ("u32 u32", "u32", max),
    "min.relu.s32 %o, %a, %b;": ("s32 s32", "s32", lambda a, b: max(0, min(a, b))),
    "neg.s32 %o, %a;": ("s32", "s32", operator.neg),
    "abs.s32 %o, %a;": ("s32", "s32", abs),
    "and.b32 %o, %a, %b;": ("b32 b32", "b32", operator.and_),
    "or.b16 %o, %a, %b;": ("b16 b16", "b16", operator.or_),
    "xor.b64 %o, %a, %b;": ("b64 b64", "b64", operator.xor),
    "not.b32 %o, %a;": ("b32", "b32", operator.invert),
    "shl.b32 %o, %a, %b;": ("b32 n", "b32", lambda a, n: a << n),
    "shr.u32 %o, %a, %b;": ("u32 n", "u32", lambda a, n: a >> n),
    "shr.s32 %o, %a, %b;": ("s32 n", "s32", lambda a, n: a >> n),
    "shr.u64 %o, %a, %b;": ("u64 n", "u64", lambda a, n: a >> n),
    "shf.l.wrap.b32 %o, %a, %b, %c;": ("b32 b32 n", "b32", lambda a, b, n: (b << 32 | a) << (n & 31) >> 32),
    "shf.r.clamp.b32 %o, %a, %b, %c;": ("b32 b32 n", "b32", lambda a, b, n: (b << 32 | a) >> min(n, 32)),
    "bfe.u32 %o, %a, %b, %c;": ("u32 n n", "u32", field),
    "bfe.s32 %o, %a, %b, %c;": ("u32 n n", "u32", signed_field),
    "bfi.b32 %o, %a, %b, %c, 9;": ("b32 b32 n", "b32", lambda a, b, n: inserted(a, b, n, 9)),
    "bfi.b32 %o, %a, %b, 5, %c;": ("b32 b32 n", "b32", lambda a, b, n: inserted(a, b, 5, n)),
    "prmt.b32 %o, %a, %b, %c;": ("b32 b32 b32", "b32", permuted),
    "lop3.b32 %o, %a, %b, %c, 0xEA;": ("b32 b32 b32", "b32", by_table(0xEA)),
    "lop3.b32 %o, %a, %b, %c, 0x1D;": ("b32 b32 b32", "b32", by_table(0x1D)),
    "popc.b32 %o, %a;": ("b32", "b32", lambda a: a.bit_count()),
    "cvt.s64.s32 %o, %a;": ("s32", "s64", int),
    "cvt.u64.u32 %o, %a;": ("u32", "u64", int),
    "cvt.u16.u32 %o, %a;": ("u32", "u16", int),
    "cvt.s32.s8 %o, %a;": ("b32", "s32", lambda a: (a & 255) - (a & 128) * 2),
    "setp.lt.s32 %p0, %a, %b; selp.b32 %o, %a, %b, %p0;": ("s32 s32", "s32", min),
    "setp.hi.u32 %p0, %a, %b; selp.b32 %o, %a, %b, %p0;": ("u32 u32", "u32", max),
    "{ .reg .b16 x, y; mov.b32 {x, y}, %a; mov.b32 %o, {y, x}; }": ("b32", "b32", lambda a: a >> 16 | a << 16),
    "setp.ne.b32 %p0, %a, 1; @!%p0 mov.b32 %o, 7; @%p0 add.s32 %o, %a, 1;": (
        "s32",
        "s32",
        lambda a: 7 if a == 1 else a + 1,
    ),
}


@pytest.mark.parametrize("code", INTEGERS)
def test_integers(code: str) -> None:
    check(code, *INTEGERS[code])


def smaller(a: Any, b: Any) -> Any:
    """NaN loses."""
    return b if a != a else a if b != b else min(a, b)


def larger(a: Any, b: Any) -> Any:
    return b if a != a else a if b != b else max(a, b)


def whole(low: int, high: int, rounding: Callable[[Any], int]) -> Callable[[Any], int]:
    """Of a float, within a range; 0 for NaN."""
    return lambda x: (
        0 if x != x else (high if x > 0 else low) if abs(x) == math.inf else max(low, min(high, rounding(x)))
    )


FLOATS = {
    **{
        f"{op}.{rn}{kind} %o, %a, %b;": (f"{kind} {kind}", kind, function)
        for kind, rn in (("f32", "rn."), ("f16", ""), ("bf16", "rn."))
        for op, function in (("add", operator.add), ("sub", operator.sub), ("mul", operator.mul))
    },
    "fma.rn.f32 %o, %a, %b, %c;": ("f32 f32 f32", "f32", lambda a, b, c: a * b + c),
    "fma.rn.f16 %o, %a, %b, %c;": ("f16 f16 f16", "f16", lambda a, b, c: a * b + c),
    "fma.rn.bf16 %o, %a, %b, %c;": ("bf16 bf16 bf16", "bf16", lambda a, b, c: a * b + c),
    "add.rn.f32.f16 %o, %a, %b;": ("f16 f32", "f32", operator.add),  # of Blackwell
    "min.f32 %o, %a, %b;": ("f32 f32", "f32", smaller),
    "max.f32 %o, %a, %b;": ("f32 f32", "f32", larger),
    "max.f16 %o, %a, %b;": ("f16 f16", "f16", larger),
    "neg.f32 %o, %a;": ("f32", "f32", operator.neg),
    "abs.bf16 %o, %a;": ("bf16", "bf16", abs),
    "cvt.rn.f16.f32 %o, %a;": ("f32", "f16", lambda a: a),
    "cvt.rn.bf16.f32 %o, %a;": ("f32", "bf16", lambda a: a),
    "cvt.f32.f16 %o, %a;": ("f16", "f32", lambda a: a),
    "cvt.f32.bf16 %o, %a;": ("bf16", "f32", lambda a: a),
    "cvt.rn.f32.s32 %o, %a;": ("s32", "f32", Fraction),
    "cvt.rn.f32.u32 %o, %a;": ("u32", "f32", Fraction),
    "cvt.rn.f16.u16 %o, %a;": ("u16", "f16", Fraction),
    "cvt.rzi.s32.f32 %o, %a;": ("f32", "s32", whole(-(2**31), 2**31 - 1, int)),
    "cvt.rni.s32.f32 %o, %a;": ("f32", "s32", whole(-(2**31), 2**31 - 1, round)),
    "cvt.rzi.u32.f32 %o, %a;": ("f32", "u32", whole(0, 2**32 - 1, int)),
    "cvt.rmi.f32.f32 %o, %a;": ("f32", "f32", lambda a: Fraction(math.floor(a)) if math.isfinite(a) else a),
    "add.ftz.f32 %o, %a, %b;": ("f32 f32", "f32", lambda a, b: _flushed(_flushed(a) + _flushed(b))),
}


def _flushed(x: Any) -> Any:
    return x * 0 if abs(x) < Fraction(1, 2**126) and x != 0 else x


@pytest.mark.parametrize("code", FLOATS)
def test_floats_are_rounded_once(code: str) -> None:
    check(code, *FLOATS[code])


def test_fused_where_products_cancel() -> None:
    """``c`` is the product rounded, so that what is left is what an unfused operation loses."""
    a, b = floats(COUNT, seed=1), floats(COUNT, seed=2)
    with np.errstate(all="ignore"):
        c = (-(a.view(np.float32) * b.view(np.float32))).view(np.uint32) ^ (words(COUNT, 32) & np.uint32(3))
    got = elementwise("fma.rn.f32 %o, %a, %b, %c;", [a, b, c], 32)
    assert not differing(got, lambda x, y, z: x * y + z, [a, b, c], ["f32"] * 3, "f32")


COMPARISONS = {
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "eq": operator.eq,
    "ne": lambda a, b: a == a and b == b and a != b,
    "num": lambda a, b: a == a and b == b,
}
NEGATIONS = {"geu": "lt", "gtu": "le", "leu": "gt", "ltu": "ge", "neu": "eq", "equ": "ne", "nan": "num"}


@pytest.mark.parametrize("name", [*COMPARISONS, *NEGATIONS])
def test_comparisons_of_floats(name: str) -> None:
    """The unordered ones are the negations of the others, so true for NaN."""
    a, b = floats(COUNT, seed=1), floats(COUNT, seed=2)
    b = np.where(np.arange(COUNT) % 3 == 0, a, b)
    holds = COMPARISONS[NEGATIONS.get(name, name)]
    got = elementwise(f"setp.{name}.f32 %p0, %a, %b;\nselp.b32 %o, 1, 0, %p0;", [a, b], 32)
    assert not differing(got, lambda x, y: int(holds(x, y) != (name in NEGATIONS)), [a, b], ["f32", "f32"], "u32")


APPROXIMATE = {
    "ex2.approx.f32 %o, %a;": lambda a: 2.0**a,
    "lg2.approx.f32 %o, %a;": math.log2,
    "rsqrt.approx.f32 %o, %a;": lambda a: a**-0.5,
    "sqrt.rn.f32 %o, %a;": math.sqrt,
    "rcp.approx.ftz.f32 %o, %a;": lambda a: 1 / a,
    "div.full.f32 %o, 3.0, %a;": lambda a: 3 / a,
}


@pytest.mark.parametrize("code", APPROXIMATE)
def test_functions(code: str) -> None:
    x = np.random.default_rng(0).uniform(0.01, 20, COUNT).astype(np.float32)
    got = elementwise(code.replace("3.0", "0f40400000"), [x.view(np.uint32)], 32).view(np.float32)
    want = np.array([APPROXIMATE[code](float(a)) for a in x])
    np.testing.assert_allclose(got, want, rtol=2.0**-23)


PACKED = {
    "add.f16x2 %o, %a, %b;": ("f16", operator.add),
    "mul.bf16x2 %o, %a, %b;": ("bf16", operator.mul),
    "max.f16x2 %o, %a, %b;": ("f16", larger),
    "fma.rn.f16x2 %o, %a, %b, %b;": ("f16", lambda a, b: a * b + b),
}


@pytest.mark.parametrize("code", PACKED)
def test_packed_halves(code: str) -> None:
    kind, function = PACKED[code]
    pairs = [floats(2 * COUNT, kind, seed) for seed in (1, 2)]
    got = elementwise(code, [pair.view(np.uint32) for pair in pairs], 32).view(np.uint16)
    assert not differing(got, function, pairs, [kind, kind], kind)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_the_first_of_a_packed_conversion_is_the_upper_half(kind: str) -> None:
    a, b = floats(COUNT, seed=1), floats(COUNT, seed=2)
    got = elementwise(f"cvt.rn.{kind}x2.f32 %o, %a, %b;", [a, b], 32)
    for half, given in ((got >> 16, a), (got & 0xFFFF, b)):
        assert not differing(half.astype(np.uint16), lambda x: x, [given], ["f32"], kind)


SHUFFLES = {
    "bfly": lambda lane, n: lane ^ n,
    "idx": lambda lane, n: n,
    "down": lambda lane, n: lane + n if lane + n < 32 else lane,
    "up": lambda lane, n: lane - n if lane >= n else lane,
}


@pytest.mark.parametrize("mode", SHUFFLES)
@pytest.mark.parametrize("distance", [1, 4, 16, 19])
def test_shuffles(mode: str, distance: int) -> None:
    lanes = np.arange(100, 132, dtype=np.uint32)
    clamp = 0 if mode == "up" else 31
    got = elementwise(f"shfl.sync.{mode}.b32 %o, %a, {distance}, {clamp}, -1;", [lanes], 32)
    assert got.tolist() == [100 + SHUFFLES[mode](lane, distance) for lane in range(32)]


@pytest.mark.parametrize(("code", "function"), [("max.s32", max), ("add.u32", sum), ("min.u32", min)])
def test_reductions_of_a_warp(code: str, function: Callable[[list[int]], int]) -> None:
    x = words(64) >> np.uint32(8)
    got = elementwise(f"redux.sync.{code} %o, %a, -1;", [x], 32)
    assert got.tolist() == [function(warp.tolist()) for warp in x.reshape(2, 32) for _ in range(32)]


@pytest.mark.parametrize("opcode", ["frobnicate.b32", "add.sat.s32", "bar.red.popc.u32", "mul.hi.u64", "max.NaN.f32"])
def test_what_is_not_implemented_is_named(opcode: str) -> None:
    with pytest.raises(PtxError, match=rf"does not implement {opcode}.*k: {opcode} %r0, %r1, %r2"):
        Machine().launch(kernel(f"{opcode} %r0, %r1, %r2;", 0), 0, (1,), [])


def test_threads_that_part_meet_again() -> None:
    """A loop of as many rounds as the thread's number, with a branch in every other one, and a barrier behind it."""
    body = """
        mov.u32 %r1, %tid.x;
        ld.param.b64 %d0, [k_param_0];
        mad.wide.s32 %d0, %r1, 4, %d0;
        mov.b32 %r2, 0;
        mov.b32 %r3, 0;
        $round:
        setp.ge.s32 %p0, %r2, %r1;
        @%p0 bra $end;
        and.b32 %r4, %r2, 1;
        setp.eq.b32 %p1, %r4, 0;
        @%p1 bra $even;
        add.s32 %r3, %r3, 100;
        $even:
        add.s32 %r3, %r3, 1;
        add.s32 %r2, %r2, 1;
        bra $round;
        $end:
        bar.sync 0;
        st.global.b32 [%d0], %r3;"""
    out = torch.zeros(64, dtype=torch.int32)
    machine = Machine()
    machine.launch(kernel(body, 1, threads=64), 0, (1,), [out])
    machine.check()
    assert out.tolist() == [i + 100 * (i // 2) for i in range(64)]
    (launch,) = machine.launches
    assert launch.global_written == 256 and launch.opcodes["add.s32"] == sum(2 * i + i // 2 for i in range(64))
