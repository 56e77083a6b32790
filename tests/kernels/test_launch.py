"""The launch table: every row answers for something, overrides work, and splits fill the device."""

import dataclasses
import itertools

import pytest

from kvquant_hf.triton_kernels.launch import (
    LAUNCH_TABLE,
    MAX_SPLITS,
    OPEN_COST,
    LaunchConfig,
    launch_config,
    launch_row,
    override_launch,
    split_count,
)

ARCHITECTURES = ("sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "cpu")
HELD = {"sm_90": 132, "sm_120": 170, "sm_86": 82, "gfx942": 304}


def questions() -> list[tuple[str, int, int, int, int, int]]:
    return [
        (architecture, itemsize, page * dim, rows, bits, planes)
        for architecture in ARCHITECTURES
        for itemsize in (2, 4)
        for page in (16, 64, 128)
        for dim in (64, 80, 128, 192, 256)
        for rows in (1, 8, 9, 64)
        for bits in (6, 8, 16, 32)
        for planes in (2, 3, 4)
    ]


@pytest.mark.parametrize("row", LAUNCH_TABLE, ids=lambda row: f"{row.architecture or 'any'}-{row.elements}-{row.rows}")
def test_every_row_is_reached(row: object) -> None:
    assert any(launch_row(*question) is row for question in questions())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_question_has_an_answer(architecture: str) -> None:
    for question in questions():
        if question[0] == architecture:
            config = launch_config(*question)
            assert config.rows >= 8 and config.rows & (config.rows - 1) == 0
            assert config.warps in (1, 2, 4, 8) and config.stages >= 1 and config.residents >= 1
            # A thread has 255 registers and a multiprocessor 65536; what is said to be held at once must fit.
            wave = 64 if architecture.startswith("gfx") else 32
            assert config.residents * config.warps * wave * 256 <= 65536 * (wave // 32) * 2


def test_the_common_case_is_one_warp() -> None:
    assert launch_config("sm_90", 2, 64 * 128, 4, 8) == LaunchConfig(rows=8, warps=1, stages=3, residents=8)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize(("bits", "planes"), [(5, 3), (6, 4), (7, 3), (11, 3)])
def test_codes_in_two_planes_have_rows_of_their_own(architecture: str, bits: int, planes: int) -> None:
    """3 bits on either side or both: one warp whatever the bits and rows of the query, two for twice the elements."""
    for rows in (4, 64):
        for dim, warps, stages, residents in ((64, 1, 2, 8), (80, 1, 1, 8), (128, 1, 2, 8), (256, 2, 2, 4)):
            expected = LaunchConfig(rows=8, warps=warps, stages=stages, residents=residents)
            assert launch_config(architecture, 2, 64 * dim, rows, bits, planes) == expected


def test_masks_take_two_warps_on_the_newest_gpus() -> None:
    config = launch_config("sm_100", 2, 64 * 128, 4, 8)
    assert (config.warps, config.residents) == (1, 8)
    assert (config.masked().warps, config.masked().residents) == (2, 4)
    with override_launch(warps=4):
        assert launch_config("sm_100", 2, 64 * 128, 4, 8).masked().warps == 4
    for row in LAUNCH_TABLE:
        if not row.config.masked_warps:
            assert row.config.masked() is row.config


def test_override() -> None:
    question = ("sm_90", 2, 64 * 128, 4, 8)
    before = launch_config(*question)
    with override_launch(warps=4, splits=3):
        assert launch_config(*question) == dataclasses.replace(before, warps=4)
        assert split_count(before, 64, 512, 132) == 3
        assert split_count(before, 64, 2, 132) == 2
        with override_launch(warps=2):
            assert launch_config(*question).warps == 2
        assert launch_config(*question).warps == 4
    assert launch_config(*question) == before
    with pytest.raises(TypeError, match="warp"), override_launch(warp=4):
        pass


@pytest.mark.parametrize("architecture", HELD)
@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("tokens", [1024, 4096, 32768, 131072])
def test_splits_fill_the_device(architecture: str, batch: int, tokens: int) -> None:
    heads, page, processors = 8, 64, HELD[architecture]
    config = launch_config(architecture, 2, page * 128, 4, 8)
    pages = tokens // page
    splits = split_count(config, batch * heads, pages, processors)
    assert 1 <= splits <= min(pages + 1, MAX_SPLITS)
    per_split = -(-(pages + OPEN_COST) // splits)
    assert per_split * (splits - 1) < pages + OPEN_COST, "the last split has nothing"
    held = processors * config.residents
    waves = -(-batch * heads * splits // held)
    assert waves <= 8, "more splits than the device needs"
    # At least as long as it takes when all work is spread evenly, and at most a quarter longer (plus the open page).
    evenly = batch * heads * (pages + OPEN_COST) / held
    if splits < min(pages, MAX_SPLITS):
        assert evenly <= waves * per_split <= 1.25 * evenly + OPEN_COST


def test_the_open_page_has_its_share() -> None:
    """The last split has as many pages fewer as the open page counts for, and no split is without work."""
    for programs, pages, held in itertools.product((1, 8, 64), (1, 2, 7, 32, 512), (16, 400, 1056)):
        splits = split_count(LaunchConfig(residents=1), programs, pages, held)
        each = -(-(pages + OPEN_COST) // splits)
        assert each * (splits - 1) < pages + OPEN_COST, (programs, pages, held)
        assert each * splits >= pages + OPEN_COST


def test_no_pages() -> None:
    assert split_count(LaunchConfig(), 8, 0, 132) == 1


def test_h100_figures() -> None:
    """8 heads on 132 multiprocessors, 8 programs each: the numbers that docs/kernels.md explains."""
    table = {(b, t): split_count(LaunchConfig(), 8 * b, t * 16, 132) for b in (1, 8, 64) for t in (1, 4, 32, 128)}
    assert table == {
        (1, 1): 9,
        (1, 4): 33,
        (1, 32): 129,
        (1, 128): 129,
        (8, 1): 9,
        (8, 4): 14,
        (8, 32): 16,
        (8, 128): 16,
        (64, 1): 2,
        (64, 4): 2,
        (64, 32): 2,
        (64, 128): 2,
    }
