"""Every kernel compiles for every GPU, without stack where the launch table is tuned, and within shared memory.

Compiled ahead of time in another process (``aot.py``), so no GPU is needed and the interpreter does not matter.  Each
test is one target, in the full matrix (``-m full``) one target and pair of codecs, so that parts of it can be run by
name: ``pytest -m full tests/kernels/test_compile_targets.py -k "sm_90 and int4"``.
"""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from kernels.aot import TARGETS, Built, Case, compile_cases, main_loop

from kvquant_hf.triton_kernels import choice
from kvquant_hf.triton_kernels.codecs import CODECS

PAIRS = {
    "exact": ("exact", "exact"),
    "int8": ("int8-channel", "int8-affine"),
    "int4": ("int4-ranked", "int4-hadamard"),
    "turboquant": ("int4-ranked", "octet2"),
    "kv3": ("int3-ranked", "octet3"),
    "channel4": ("int4-channel", "int4-hadamard"),
    "channel2": ("int4-channel", "lloyd2"),
    "lloyd4": ("lloyd4-centred", "lloyd2"),
    "lloyd3": ("lloyd3-channel", "lloyd3"),
    "int8-token": ("int8-token", "int8-token"),
    "int4-token": ("int4-token", "int4-token"),
    "turboquant-qjl": ("lloyd3-sign", "lloyd2-plain"),
    "fp8": ("fp8", "fp8"),
    "nvfp4": ("nvfp4", "nvfp4"),
}
# Of codecs that others of these have too.
RARER = {"kv2.9": ("int3-ranked", "octet2"), "kv2.4": ("int2-ranked", "octet2")}
ALL_PAIRS = PAIRS | RARER
# Masks of several rows, float32 models and GPUs whose products run without tensor cores may use stack.
UNTUNED = ("sm_7",)
# With 3-bit codes on one side, as `kvquant tune` mixes them.
MIXED = (
    ("lloyd3-channel", "lloyd2"),
    ("lloyd3-channel", "int4-hadamard"),
    ("lloyd3-channel", "int8-affine"),
    ("int4-channel", "lloyd3"),
    ("int8-channel", "lloyd3"),
)


# As DeepSeek-V2 and V3 have them, with the heads of DeepSeek-V2-Lite.
LATENTS = {"kernel": "latent", "head_dim": 512, "group": 16}
# A GPU whose products run without tensor cores and one with everything; the others are compiled when kernels change.
USUAL = ("sm_75", "sm_90")


def allowed(case: Case, registers: int | None) -> int:
    """Bytes of stack that a tuned kernel may have: none but in the cases named here, and there none in most shapes.

    * Below 255 registers the assembler gives up a few for one more program on a multiprocessor.
    * LMDeploy's keys with a sign, ``lloyd3-sign``: on sm_86 and sm_89, and where head_dim is padded.
    * Latents in an order of their own, on sm_86 and sm_89.
    * 3-bit codes.  Signs of values come from shared memory byte by byte, and a thread has twice as many in a long page;
      so do the third bits of ``octet3``, whose registers are all taken.
    """
    if case.kernel == "latent" and case.target in ("sm_86", "sm_89"):
        return 32
    if registers is not None and registers <= 168:
        return 16
    if case.keys == "lloyd3-sign":
        return 24
    if case.values == "lloyd3" and case.page_size > 64:
        return 128
    if case.values == "octet3":
        return 256 if case.page_size > 64 else 32 if case.target.startswith("sm_1") or case.head_dim > 128 else 0
    sides = (case.keys == "lloyd3-channel") + (case.values == "lloyd3")
    newest = case.target.startswith("sm_1") and (bool(case.mask) or case.head_dim > 128)
    return 32 if sides == 2 or (sides and newest) else 0


def check(case: Case, built: list[Built] | str) -> list[str]:
    """What is wrong with the kernels of ``case``, one line each."""
    if isinstance(built, str):
        return [f"{case}: {built}"]
    wrong = []
    tuned = case.dtype != "float32" and not case.target.startswith(UNTUNED) and (not case.mask or case.queries == 1)
    for kernel in built:
        if kernel.shared > TARGETS[case.target].shared:
            wrong.append(f"{case}: {kernel.name} wants {kernel.shared} bytes of shared memory")
        if tuned and (kernel.spilled or 0) > allowed(case, kernel.registers):
            wrong.append(f"{case}: {kernel.name} has {kernel.spilled} bytes of stack with {kernel.registers} registers")
    return wrong


def trimmed(target: str) -> list[Case]:
    """A case of each kind that could fail on ``target`` alone; ``test_the_loop_of_sm_90`` has the common ones there."""
    half = "float16" if target.startswith(UNTUNED) else "bfloat16"
    names = {
        "sm_70": ("int4",),
        "sm_75": ("turboquant",),
        "sm_80": ("int8", "int4", "turboquant", "turboquant-qjl", "nvfp4", "channel2"),
        "sm_86": ("int4",),
        "sm_89": ("turboquant",),
        "sm_90": ("int8-token", "int4-token", "fp8", "nvfp4", "lloyd3", "kv3", "channel4"),
        "sm_120": ("int4", "kv3"),
    }
    cases = [Case(target, *PAIRS[name], dtype=half) for name in names.get(target, ("int4", "turboquant"))]
    mixed = {"sm_80": MIXED[3:4], "sm_90": MIXED[:1], "sm_120": MIXED[:1]}
    cases += [Case(target, *pair, dtype=half) for pair in mixed.get(target, ())]
    if target in ("sm_75", "sm_90", "gfx942"):
        cases.append(Case(target, *PAIRS["int4"], dtype=half, kernel="append"))
    if target in USUAL:
        cases.append(Case(target, *PAIRS["int4"], dtype=half, **LATENTS))
    if target == "sm_75":  # the least shared memory, and the largest tiles
        cases.append(Case(target, *PAIRS["int4"], dtype="float32", head_dim=256, queries=512))
    if target in ("sm_80", "sm_90"):
        cases += [Case(target, *PAIRS["int4"], dtype=half, first=1, **more) for more in ({}, {"queries": 512})]
    if target == "sm_90":
        cases.append(Case(target, *PAIRS["turboquant-qjl"]))
        cases += [Case(target, *PAIRS["lloyd4"], head_dim=64), Case(target, *PAIRS["exact"], head_dim=256)]
        cases += [
            Case(target, *PAIRS["int4"], queries=16),
            Case(target, *PAIRS["lloyd4"], queries=512),
            Case(target, *PAIRS["int8"], dtype="float32", head_dim=64),
        ]
        cases += [Case(target, *PAIRS["int4"], mask="bool"), Case(target, *PAIRS["int8"], mask="bool", queries=4)]
        cases += [Case(target, *PAIRS["int4"], dtype="float16", softcap=30.0, window=512, head_dim=80)]
    return cases


def full(target: str, name: str) -> list[Case]:
    """Both launchers x dtypes, and what changes the code; every shape on sm_90 alone."""
    everything = target == "sm_90"
    half = "float16" if target.startswith(UNTUNED) else "bfloat16"
    kinds = [
        {},
        {"queries": 16},
        {"queries": 16, "head_dim": 64},
        {"head_dim": 256},
        {"head_dim": 80, "queries": 2, "softcap": 30.0, "window": 512},
        {"page_size": 128},
        {"mask": "bool"},
        {"queries": 512},
        {"queries": 512, "head_dim": 256, "mask": "bool"},
        {"queries": 512, "dtype": "float32"},
        {"queries": 512, "dtype": "float32", "head_dim": 256},
    ]
    if everything:
        kinds += [{"head_dim": dim, "group": 7} for dim in (64, 80, 96, 192)]
        kinds += [{"group": group} for group in (1, 16)] + [{"group": 16, "head_dim": 64}]
        kinds += [{"queries": 16, "head_dim": 256}, {"page_size": 16}, {"page_size": 32}]
        kinds += [{"mask": mask, "queries": q} for mask, q in (("bfloat16", 1), ("bool", 4), ("float32", 4))]
    if name == "exact" and target in choice._MAX_EXACT_ELEMENTS:  # no room for larger pages, which choice.py refuses
        kinds = [kind for kind in kinds if kind.get("page_size", 64) * kind.get("head_dim", 128) <= 64 * 128]
        kinds += [{"head_dim": 256, "page_size": 32}]
    attention = [{"dtype": dtype} for dtype in ("float16", "bfloat16", "float32")]
    attention += [{"dtype": half, **kind} for kind in kinds]
    if everything:
        attention += [{"dtype": d, "head_dim": dim} for d in ("float16", "float32") for dim in (64, 80, 96, 192, 256)]
    append = [{"dtype": dtype} for dtype in ("float16", "bfloat16", "float32")]
    append += [
        {"dtype": half, "head_dim": dim, "queries": 65} for dim in ((64, 80, 96, 192, 256) if everything else (80,))
    ]
    cases = [Case(target, *ALL_PAIRS[name], **fields) for fields in attention]
    cases += [Case(target, *ALL_PAIRS[name], kernel="append", **fields) for fields in append]
    if name in ("exact", "int8", "int4", "turboquant", "channel4"):
        kinds = [{"dtype": half}, {"dtype": half, "queries": 5, "mask": "bool", "first": 1}]
        kinds += [{"dtype": "float32"}] * (target != "sm_75")  # no room, and choice.py refuses
        cases += [Case(target, *ALL_PAIRS[name], **LATENTS, **kind) for kind in kinds]
    return list(dict.fromkeys(cases))


@pytest.mark.slow
@pytest.mark.parametrize(
    "target", [name if name in USUAL else pytest.param(name, marks=pytest.mark.full) for name in TARGETS]
)
def test_compiles(target: str) -> None:
    wrong = [line for case, built in compile_cases(trimmed(target)).items() for line in check(case, built)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "name"),
    [
        pytest.param(target, name, marks=() if (target, name) == ("sm_80", "int4") else pytest.mark.full)
        for target in ("sm_80", "sm_120")
        for name in ("int4", "turboquant", "kv2.9", "kv2.4")
    ],
)
def test_the_assembler_gives_up_nothing_for_programs_that_are_not_launched(target: str, name: str) -> None:
    case = Case(target, *ALL_PAIRS[name])
    ((_, built),) = compile_cases([case]).items()
    assert not isinstance(built, str) and [kernel.spilled for kernel in built] == [0] * len(built)


@pytest.mark.full
@pytest.mark.parametrize("name", ALL_PAIRS)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_in_full(target: str, name: str) -> None:
    wrong = [line for case, built in compile_cases(full(target, name)).items() for line in check(case, built)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.full
@pytest.mark.parametrize("target", [name for name in TARGETS if name not in ("sm_70", "gfx942")])
def test_every_pair(target: str) -> None:
    """Every pair, each launcher once: what ``make test-triton`` asks of other versions of Triton.

    A compiler that nothing is tuned for may need stack, but not for the pairs that it is chosen for."""
    half = "float16" if target.startswith(UNTUNED) else "bfloat16"
    kinds = ({}, {"queries": 512}, {"kernel": "append"})
    cases = [Case(target, *pair, dtype=half, **kind) for pair in ALL_PAIRS.values() for kind in kinds]
    tuned = [PAIRS[name] for name in ("exact", "int8", "int4", "channel4", "channel2")]
    wrong = []
    for case, built in compile_cases(cases).items():
        if isinstance(built, str) or (case.keys, case.values) in tuned:
            wrong += check(case, built)
        if not isinstance(built, str) and (case.keys, case.values) in tuned and not target.startswith(UNTUNED):
            spilled = [kernel for kernel in built if (kernel.spilled or 0) > 8 * ((kernel.registers or 255) <= 168)]
            wrong += [f"{case}: {kernel.name} has {kernel.spilled} bytes of stack" for kernel in spilled]
    assert not wrong, "\n".join(wrong)


@pytest.mark.full
@pytest.mark.parametrize("target", TARGETS)
def test_mixed_pairs_compile(target: str) -> None:
    kinds = ({"dtype": "float16" if target.startswith(UNTUNED) else "bfloat16"}, {"mask": "bool"}, {"head_dim": 256})
    cases = [Case(target, *pair, **(kinds[0] | kind)) for pair in MIXED for kind in kinds]
    wrong = [line for case, built in compile_cases(cases).items() for line in check(case, built)]
    assert not wrong, "\n".join(wrong)


BUFFERED = ("exact", "int8", "int4", "turboquant", "channel4")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("sm_80", BUFFERED[::2]),
        ("sm_90", BUFFERED[1::2]),
        pytest.param("sm_80", BUFFERED[1::2], marks=pytest.mark.full),
        pytest.param("sm_90", BUFFERED[::2], marks=pytest.mark.full),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_two_page_buffers(target: str, names: tuple[str, ...]) -> None:
    """A page is copied while one is worked on: every plane has room for two."""
    cases = [Case(target, *ALL_PAIRS[name]) for name in names]
    for case, built in compile_cases(cases).items():
        assert not check(case, built)
        (decode,) = (kernel for kernel in built if "decode" in kernel.name)
        assert decode.buffers and set(decode.buffers) == {2}, f"{case}: {decode.buffers}"
        # Of all copies under way, those of the next page, one for each buffer, may go on.
        assert decode.waits and min(decode.waits) >= len(decode.buffers), f"{case}: waits for what was asked for last"


@pytest.mark.slow
def test_the_loop_of_sm_90() -> None:
    """Packed data is copied 16 bytes at a time and a page ahead, and tensor cores do the products."""
    # Bits of a code, keys plus values.
    cases = {Case("sm_90", *PAIRS[name]): bits for name, bits in (("int8", 16), ("int4", 8), ("turboquant", 6))}
    for case, built in compile_cases(list(cases), sass=True).items():
        assert not check(case, built)
        (decode,) = (kernel for kernel in built if "decode" in kernel.name)
        loop = main_loop(decode.sass)
        # Bytes of keys and values of one page that a thread copies, 16 at a time, and of a query in its order.
        page = case.page_size * case.head_dim * cases[case] // 8
        page += 16 * case.head_dim * (CODECS[case.keys].kernel.order is not None)
        assert loop.count(r"LDGSTS\.E.*\.128") == page // (16 * 32 * decode.warps)
        assert loop.count("HMMA|HGMMA") > 0
        assert loop.count(r"LDG\.E.*128|STS.*128") == 0, "codes go through registers twice"
