"""The PTX of ``ptx.py``, run by the PTX machine over all words, gives the levels of the generic path bit for bit."""

import re

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from kernels.ptx_text import evaluate

from kvquant_hf.triton_kernels import ptx, unpack
from kvquant_hf.triton_kernels.codecs import lloyd_max, octet, small_float, turboquant_qjl

WORDS = np.arange(1 << 16, dtype=np.uint32)
# The word in the upper half: all of them too, in another order.
OTHERS = (WORDS * 40503 + 12345) & 0xFFFF


def run(asm: str, parts: int, inputs: tuple[np.ndarray, ...] = (WORDS | (OTHERS << 16),)) -> list[np.ndarray]:
    """The result registers after ``asm`` on all words, in whatever lane they fall."""
    given = np.broadcast_arrays(*inputs)
    names = [f"%o{i}" for i in range(parts)] + [f"%{name}" for name, _ in zip("abc", given, strict=False)]
    code = re.sub(r"\$(\d+)", lambda place: names[int(place[1])], asm)
    return evaluate(code if code.startswith("{") else f"{{ {code} }}", given, parts)


def check(asm: str, fields: int, table: np.ndarray, first: int = 0, parts: int | None = None) -> None:
    """``asm`` gives ``table[code]`` (fp16) in parts ``first`` and following, each of both words in one register."""
    results = run(asm, parts or 2 * fields)
    bits = 8 // fields
    for part in range(2 * fields):
        shift = part // 2 * bits + part % 2 * 8
        low, high = (table[(words >> shift) & ((1 << bits) - 1)].view(np.uint16) for words in (WORDS, OTHERS))
        expected = low.astype(np.uint32) | high.astype(np.uint32) << 16
        np.testing.assert_array_equal(results[first + part], expected, err_msg=f"part {part}")


@pytest.mark.parametrize(("asm", "fields"), [(ptx.WHOLE_BYTES, 1), (ptx.NIBBLES, 2)], ids=["bytes", "nibbles"])
def test_integer_codes_are_subnormal(asm: str, fields: int) -> None:
    codes = np.arange(256, dtype=np.float64)
    table = (codes * 2.0**-24).astype(np.float16)
    np.testing.assert_array_equal(table.astype(np.float64) * 2.0**24, codes)
    check(asm, fields, table)


def test_floating_point_codes() -> None:
    """Times 2^-8 and 2^-14, signs of zeros kept; codes of e4m3 that are no number are never stored."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, (codes & 7) / 8
    numbers = np.where(exponent, 2.0 ** (exponent - 7) * (1 + mantissa), 2.0**-6 * mantissa)
    check(ptx.FLOAT8, 1, (np.where(codes & 128, -numbers, numbers) * 2.0**-8).astype(np.float16))
    magnitudes = np.array(small_float.E2M1)
    check(ptx.FLOAT4, 2, (np.concatenate([magnitudes, -magnitudes]) * 2.0**-14).astype(np.float16))


@pytest.mark.parametrize("levels", [lloyd_max.LEVELS[2], turboquant_qjl.LEVELS[2]], ids=["lloyd", "lmdeploy"])
def test_pair_lookup(levels: tuple[float, ...]) -> None:
    check(ptx.pair_lookup(levels), 4, np.array(levels, np.float16))


def test_signed_pair_lookup() -> None:
    """All words in each of the four places with several bytes of signs, other ones in each place."""
    magnitudes = np.array(lloyd_max.LEVELS[3][4:], np.float16)
    places = [WORDS, OTHERS, WORDS[::-1], OTHERS[::-1]]
    pairs = tuple(low | high << 16 for low, high in (places[:2], places[2:]))
    for signs in ("00ff5ac3", "a53cff00", "81422418", "18e70180"):
        packed = np.array([int(signs, 16)], np.uint32)
        results = run(ptx.signed_pair_lookup(lloyd_max.LEVELS[3][4:]), 16, (*pairs, packed))
        for part in range(8):
            bit = part % 2 * 4 + part // 2
            for place, (words, byte) in enumerate(zip(places, bytes.fromhex(signs)[::-1], strict=True)):
                level = magnitudes[(words >> (part // 2 * 2 + part % 2 * 8)) & 3]
                expected = -level if byte >> bit & 1 else level
                half = results[2 * part + place // 2] >> (place % 2 * 16) & 0xFFFF
                np.testing.assert_array_equal(half.astype(np.uint16), expected.view(np.uint16), err_msg=f"part {part}")


@pytest.mark.parametrize("bits", [2, 3])
def test_octet_lookup(bits: int) -> None:
    """All words in each of the four places, with several bytes of third bits; signs by the definition."""
    table, fields = np.array(octet.LEVELS[bits], np.float16), range(4)
    places = [WORDS, OTHERS, WORDS[::-1], OTHERS[::-1]]
    pairs = tuple(low | high << 16 for low, high in (places[:2], places[2:]))
    for high in ("00ff5ac3", "a53cff00", "81422418", "18e70180")[: 4 if bits == 3 else 1]:
        third = (np.array([int(high, 16)], np.uint32),) if bits == 3 else ()
        results = run(ptx.octet_lookup(octet.LEVELS[bits]), 16, (*pairs, *third))
        for place, (words, byte) in enumerate(zip(places, bytes.fromhex(high)[::-1], strict=True)):
            v = [(words >> 2 * i ^ words >> (2 * i + 8)) & 1 for i in fields]
            for part in range(8):
                field = part // 2
                codes = words >> (2 * field + part % 2 * 8) & 3
                level = table[codes | (byte >> part & 1) << 2 if bits == 3 else codes]
                expected = np.where(v[(field + 1) % 4] ^ v[(field + 2) % 4], -level, level)
                half = results[2 * part + place // 2] >> (place % 2 * 16) & 0xFFFF
                np.testing.assert_array_equal(half.astype(np.uint16), expected.view(np.uint16), err_msg=f"part {part}")


def ranked(codes: np.ndarray, unit: int) -> np.ndarray:
    """The bits of codes that leave times 2^unit and the unit of subnormals."""
    return (codes.astype(np.float64) * 2.0 ** (unit - 24)).astype(np.float16).view(np.uint16)


def test_ranked_4() -> None:
    """Both planes over all words, in both halves, beside others."""
    planes = (WORDS, OTHERS[::-1]), (OTHERS, WORDS[::-1])  # (codes, rest) of the low half, of the high one
    results = run(ptx.RANKED_4, 8, tuple(low | high << 16 for low, high in zip(*planes, strict=True)))
    for part, unit in enumerate(unpack.RANKED_UNITS[4]):
        for half, (codes, rest) in enumerate(planes):
            a, b = (plane >> (part % 2 * 8) & 0xFF for plane in (codes, rest))
            code = ((a & 15) << 2 | b & 3, a >> 4, b >> 2 & 7, b >> 5)[part // 2]
            got = (results[part] >> (16 * half) & 0xFFFF).astype(np.uint16)
            np.testing.assert_array_equal(got, ranked(code, unit), err_msg=f"part {part}")


def test_ranked_3() -> None:
    """All words in each of the four places, all bytes in each."""
    places = [WORDS, OTHERS, WORDS[::-1], OTHERS[::-1]]
    others = [(place * 7 + 3) >> 4 & 0xFF for place in places]
    packed = others[0] | others[1] << 8 | others[2] << 16 | others[3] << 24
    results = run(ptx.RANKED_3, 16, (places[0] | places[1] << 16, places[2] | places[3] << 16, packed))
    for part, unit in enumerate(unpack.RANKED_UNITS[3]):
        for place, (words, byte) in enumerate(zip(places, others, strict=True)):
            a, nibble = words >> (part % 2 * 8) & 0xFF, byte >> (part % 2 * 4) & 15
            code = (a & 15, a >> 4, nibble & 3, nibble >> 2)[part // 2]
            got = (results[2 * part + place // 2] >> (place % 2 * 16) & 0xFFFF).astype(np.uint16)
            np.testing.assert_array_equal(got, ranked(code, unit), err_msg=f"part {part}")


def test_ranked_2() -> None:
    results = run(ptx.RANKED_2, 6)
    for part, unit in enumerate(unpack.RANKED_UNITS[2]):
        for half, words in enumerate((WORDS, OTHERS)):
            byte = words >> (part % 2 * 8) & 0xFF
            code = (byte & 15, byte >> 4 & 3, byte >> 6)[part // 2]
            got = (results[part] >> (16 * half) & 0xFFFF).astype(np.uint16)
            np.testing.assert_array_equal(got, ranked(code, unit), err_msg=f"part {part}")


def test_ranked_steps() -> None:
    """Each byte is bits 14 to 7 of a number of its own."""
    results = run(ptx.RANKED_STEPS, 2)
    for part in range(2):
        low, high = ((words >> (8 * part) & 0xFF) << 7 for words in (WORDS, OTHERS))
        np.testing.assert_array_equal(results[part], low | high << 16, err_msg=f"part {part}")


def test_nibble_lookup() -> None:
    check(ptx.nibble_lookup(lloyd_max.LEVELS[4]), 2, np.array(lloyd_max.LEVELS[4], np.float16))


def test_nibble_lookup_needs_symmetry() -> None:
    with pytest.raises(ValueError, match="symmetric"):
        ptx.nibble_lookup(tuple(float(i) for i in range(16)))


def test_signed_octet_lookup() -> None:
    """Bit for bit ``level + rho`` or ``level - rho`` in fp16, for each byte's two parts."""
    table = np.array(turboquant_qjl.LEVELS[3], np.float16)
    rho = np.float16(0.1873)
    both = np.uint32(rho.view(np.uint16)) * np.uint32(0x10001)
    for byte in (0, 1):
        asm = ptx.signed_octet_lookup(turboquant_qjl.LEVELS[3], byte)
        # The number becomes an immediate.
        results = run(asm.replace("$3", f"0x{both:08x}"), 2)
        for field, result in enumerate(results):
            for words, half in ((WORDS, result & 0xFFFF), (OTHERS, result >> 16)):
                nibble = (words >> (4 * field + 8 * byte)) & 0xF
                level = table[nibble & 7]
                expected = np.where(nibble & 8, level + rho, level - rho).astype(np.float16)
                np.testing.assert_array_equal(half.astype(np.uint16), expected.view(np.uint16))


def test_the_held_register_is_zero_in_every_lane() -> None:
    """``%lanemask_lt`` has the bits of the lower lanes, so its highest bit is set in none."""
    assert all(((1 << lane) - 1) >> 31 == 0 for lane in range(32))
