"""Compute the Lloyd-Max quantizers of the unit Gaussian and print the literals of triton_kernels/codecs/lloyd_max.py.

    python benchmarks/lloyd_max_tables.py

A quantizer is optimal when every boundary is the midpoint of its two levels and every level the mean of its cell.  For
the Gaussian a cell [a, b] has the mean (pdf(a) - pdf(b)) / (cdf(b) - cdf(a)), so alternating the two conditions is
exact up to float64 rounding; it converges to the only fixed point (the density is log-concave).  Roundings of one step
move the fixed point a hundred times as far at 4 bits, and are not the same on every processor: there the last of the
printed digits may differ.
"""

import math

import numpy as np
from scipy.special import ndtr

DIGITS = 13
STEPS = 5000  # a step leaves 0.9914 of the distance at 4 bits, so 5000 leave less than the last bit


def gaussian_pdf(x: np.ndarray) -> np.ndarray:
    """Density of the unit Gaussian."""
    return np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def lloyd_max(bits: int) -> tuple[np.ndarray, np.ndarray, float]:
    """``(levels, boundaries, distortion)`` of the optimal ``bits``-bit quantizer; distortion is E (x - x_hat)^2."""
    levels = np.linspace(-2.0, 2.0, 2**bits)
    for _ in range(STEPS):
        boundaries = (levels[1:] + levels[:-1]) / 2
        edges = np.concatenate([[-np.inf], boundaries, [np.inf]])
        means = -np.diff(gaussian_pdf(edges)) / np.diff(ndtr(edges))
        # Rounding must not break the symmetry.
        means = (means - means[::-1]) / 2
        change = float(np.abs(means - levels).max())
        levels = means
        if change <= 2e-15:  # which rounding may never allow
            break
    # With every level at the mean of its cell, E (x - x_hat)^2 = E x^2 - E x_hat^2.
    return levels, boundaries, float(1 - np.sum(np.diff(ndtr(edges)) * levels**2))


def literal(name: str, tables: dict[int, np.ndarray]) -> str:
    """The Python source of one table."""
    lines = [f"{name}: dict[int, tuple[float, ...]] = {{"]
    for bits, values in tables.items():
        numbers = ["0.0" if abs(value) < 1e-12 else f"{value:.{DIGITS}f}" for value in values]
        # As the formatter wants it: one number on a line, but a single one beside its key.
        if len(numbers) == 1:
            lines.append(f"    {bits}: ({numbers[0]},),")
        else:
            lines += [f"    {bits}: (", *(f"        {number}," for number in numbers), "    ),"]
    return "\n".join([*lines, "}"])


def main() -> None:
    """Print both literals, then the distortions as a comment."""
    solved = {bits: lloyd_max(bits) for bits in (1, 2, 3, 4)}
    print(literal("LEVELS", {bits: levels for bits, (levels, _, _) in solved.items()}))
    print(literal("BOUNDARIES", {bits: boundaries for bits, (_, boundaries, _) in solved.items()}))
    print("# distortion: " + ", ".join(f"{bits} bit {value:.7f}" for bits, (_, _, value) in solved.items()))


if __name__ == "__main__":
    main()
