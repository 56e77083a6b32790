"""Paired statistics against numbers worked out by hand, and against SciPy's."""

import math

import pytest
from scipy.stats import binomtest

from kvquant_hf.evaluation.paired import Mean, Paired, compare, is_binary, mcnemar, mean_of


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 * 1/2
        (3, 0, 0.25),  # 2 * 1/8
        (0, 6, 0.03125),  # 2 * 1/64
        (5, 1, 0.21875),  # 2 * (1 + 6)/64
        (1, 9, 0.021484375),  # 2 * (1 + 10)/1024
        (8, 2, 0.109375),  # 2 * (1 + 10 + 45)/1024
        (4, 4, 1.0),  # 2 * 163/256 is more than 1
    ],
)
def test_mcnemar_by_hand(lost: int, gained: int, p: float) -> None:
    assert mcnemar(lost, gained) == p == mcnemar(gained, lost)


@pytest.mark.parametrize("n", [1, 7, 40, 1500])  # 2**1500 is more than a float can hold
def test_mcnemar_is_the_binomial_test(n: int) -> None:
    for lost in {0, n // 3, n // 2, n}:
        # SciPy's distribution is good to about 1e-12, relatively.
        assert mcnemar(lost, n - lost) == pytest.approx(binomtest(lost, n).pvalue, rel=1e-9)


def test_means_by_hand() -> None:
    assert mean_of([1, 0, 0, 1]) == Mean(4, 0.5, math.sqrt(1 / 3 / 4))
    assert mean_of([2.5]) == Mean(1, 2.5, None)
    assert is_binary([0, 1.0, True]) and not is_binary([0.5, 1])


def test_pairs_by_hand() -> None:
    exact, other = [1, 1, 1, 0, 0], [0, 0, 1, 1, 0]
    # Differences -1, -1, 0, 1, 0: mean -1/5, squares about it 3 - 1/5 = 14/5; two lost, one gained: p = 1.
    stderr = pytest.approx(math.sqrt(14 / 5 / 4 / 5))
    assert compare(exact, other, binary=True) == Paired(-0.2, stderr, 2, 1, 1.0)
    assert compare([1.5, 2.0], [1.0, 2.5], binary=False) == Paired(0.0, 0.5, None, None, None)
    assert compare([1], [0], binary=True).as_dict() == {
        "difference": -1.0,
        "difference_stderr": None,
        "lost": 1,
        "gained": 0,
        "p": 1.0,
    }
    with pytest.raises(ValueError, match="zip"):
        compare([1], [1, 0], binary=True)
