"""Compute the levels of the codecs octet2 and octet3 and print the literals of triton_kernels/codecs/octet.py.

    python benchmarks/octet_tables.py

Nearest codes of Gaussian blocks and means of the coordinates of a code in turn, as Lloyd's method does for vectors; the
blocks of a step are new ones, and the means of the last steps are averaged.  The error hardly depends on the fourth
digit, which another sequence of random numbers changes.
"""

import torch

from kvquant_hf.triton_kernels.codecs import octet
from kvquant_hf.triton_kernels.codecs.lloyd_max import lookup

BLOCKS = 1 << 16
STEPS, AVERAGED = 150, 60


def numbers(generator: torch.Generator) -> torch.Tensor:
    """Gaussian blocks, float32 ``[BLOCKS, 8]``."""
    return torch.randn(BLOCKS, 8, generator=generator)


def means(x: torch.Tensor, table: tuple[float, ...]) -> list[float]:
    """The mean of what each level of ``table`` stands for in ``x``, where its sign is taken off."""
    codes = octet.search(x, table).flatten().long()
    towards = torch.where(codes < len(table), 1.0, -1.0) * x.flatten()
    codes %= len(table)
    sums = torch.zeros(len(table)).index_add_(0, codes, towards)
    return (sums / torch.bincount(codes, minlength=len(table))).tolist()


def solve(bits: int) -> tuple[tuple[float, ...], float]:
    """The levels, rounded to four decimals, and their mean squared error on other blocks."""
    generator = torch.Generator().manual_seed(bits)
    table, late = octet.LEVELS[bits], []
    for _ in range(STEPS):
        table = tuple(means(numbers(generator), table))
        late.append(table)
    rounded = torch.tensor(late[-AVERAGED:]).mean(0).tolist()
    table = tuple(round(level, 4) for level in rounded)
    errors = [
        (lookup(octet.search(x, table), octet.signed(table)) - x).square().mean()
        for x in (numbers(generator) for _ in range(AVERAGED))
    ]
    return table, float(torch.stack(errors).mean())


def main() -> None:
    """Print the literal, then the errors as a comment."""
    solved = {bits: solve(bits) for bits in (2, 3)}
    print("LEVELS: dict[int, tuple[float, ...]] = {")
    for bits, (table, _) in solved.items():
        print(f"    {bits}: {table},")
    print("}")
    print("# mean squared error: " + ", ".join(f"{bits} bit {error:.5f}" for bits, (_, error) in solved.items()))


if __name__ == "__main__":
    main()
