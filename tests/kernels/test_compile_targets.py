"""Every kernel compiles for every GPU, without spills where the launch table is tuned, and within shared memory.

Compiled ahead of time in other processes (``aot.py``), so no GPU is needed and the interpreter does not matter.  Each
test is one process for one target; the full matrix (``-m full``) takes about half an hour on one core.
"""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from kernels.aot import TARGETS, Built, Case, compile_cases, main_loop

PAIRS = {
    "exact": ("exact", "exact"),
    "int8": ("int8-channel", "int8-affine"),
    "int4": ("int4-channel", "int4-hadamard"),
    "turboquant": ("lloyd4-centred", "lloyd2"),
    "int8-token": ("int8-token", "int8-token"),
    "int4-token": ("int4-token", "int4-token"),
    "turboquant-qjl": ("lloyd3-sign", "lloyd2-plain"),
}
# Bytes of stack of a thread that are left; none of them is used once per element (a page of it is 512 elements a
# thread).
STACK = {"turboquant-qjl": 80}
# Masks of several rows, float32 models and GPUs whose products run without tensor cores are not promised anything.
UNTUNED = ("sm_7",)


def name_of(case: Case) -> str:
    return next(name for name, pair in PAIRS.items() if pair == (case.keys, case.values))


def check(case: Case, built: list[Built] | str) -> list[str]:
    """What is wrong with the kernels of ``case``, one line each."""
    if isinstance(built, str):
        return [f"{case}: {built}"]
    wrong = []
    tuned = case.dtype != "float32" and not case.target.startswith(UNTUNED) and (not case.mask or case.queries == 1)
    for kernel in built:
        if kernel.shared > TARGETS[case.target].shared:
            wrong.append(f"{case}: {kernel.name} wants {kernel.shared} bytes of shared memory")
        if tuned and kernel.spilled > STACK.get(name_of(case), 0):
            wrong.append(f"{case}: {kernel.name} spills {kernel.spilled} bytes with {kernel.registers} registers")
    return wrong


def trimmed(target: str) -> list[Case]:
    """A case of each kind that could fail on ``target`` alone."""
    half = "float16" if target == "sm_75" else "bfloat16"
    cases = [Case(target, *PAIRS[name], dtype=half) for name in ("int8", "int4", "turboquant")]
    if target in ("sm_80", "sm_90"):
        cases += [Case(target, *pair) for name, pair in PAIRS.items() if "token" in name or "qjl" in name]
    if target == "sm_90":
        cases += [Case(target, *PAIRS[name], head_dim=dim) for name in ("exact", "turboquant") for dim in (64, 256)]
        cases += [Case(target, *PAIRS["int4"], queries=16), Case(target, *PAIRS["int8"], dtype="float32", head_dim=64)]
        cases += [Case(target, *PAIRS["int4"], mask="bool"), Case(target, *PAIRS["int8"], mask="bool", queries=4)]
        cases += [Case(target, *PAIRS["int4"], dtype="float16", softcap=30.0, window=512, head_dim=80)]
    return cases


def full(target: str) -> list[Case]:
    """Every pair of the policies x dtypes x head_dims x query counts, and what changes the code."""
    cases = []
    for pair in PAIRS.values():
        for dtype in ("float16", "bfloat16", "float32"):
            for head_dim in (64, 80, 96, 128, 192, 256):
                cases.append(Case(target, *pair, dtype=dtype, head_dim=head_dim))
                cases += [Case(target, *pair, dtype=dtype, head_dim=head_dim, queries=16)] * (
                    head_dim in (64, 128, 256)
                )
        cases += [Case(target, *pair, page_size=size) for size in (16, 32, 128)]
        cases += [Case(target, *pair, group=group) for group in (1, 7, 8, 16)]
        cases += [Case(target, *pair, mask=mask, queries=q) for mask in ("bool", "bfloat16") for q in (1, 4)]
        cases.append(Case(target, *pair, softcap=30.0, window=512, queries=2))
    return cases


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_compiles(target: str) -> None:
    wrong = [line for case, built in compile_cases(trimmed(target)).items() for line in check(case, built)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.full
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_in_full(target: str) -> None:
    wrong = [line for case, built in compile_cases(full(target)).items() for line in check(case, built)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_the_loop_of_sm_90() -> None:
    """Packed data is copied 16 bytes at a time and a page ahead, and tensor cores do the products."""
    cases = [Case("sm_90", *PAIRS[name]) for name in ("int8", "int4", "turboquant")]
    for case, built in compile_cases(cases, sass=True).items():
        (decode,) = (kernel for kernel in built if "decode" in kernel.name)
        loop = main_loop(decode.sass)
        # Bytes of keys and values of one page that a thread copies, 16 at a time.
        bits = {"int8": 16, "int4": 8, "turboquant": 6}[name_of(case)]
        page = case.page_size * case.head_dim * bits // 8
        assert loop.count(r"LDGSTS\.E.*\.128") == page // (16 * 32 * decode.warps)
        assert loop.count("HMMA|HGMMA") > 0
        assert loop.count(r"LDG\.E.*128|STS.*128") == 0, "codes go through registers twice"
