"""Few cases for many factors: every two values of different factors are together in one of them."""

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Rows of one value per factor, the same in every run, in which all pairs of values occur.

    Greedy: each row begins with a pair that is missing, and gets the values that add the most missing pairs.
    """
    names, order = list(factors), random.Random(0)
    missing = {
        frozenset([(a, i), (b, j)])
        for a, b in itertools.combinations(names, 2)
        for i, j in itertools.product(range(len(factors[a])), range(len(factors[b])))
    }
    rows = []
    while missing:
        row = dict(min(missing, key=sorted))
        for name in order.sample(names, len(names)):
            if name not in row:
                gains = [
                    sum(frozenset([(name, i), at]) in missing for at in row.items()) for i in range(len(factors[name]))
                ]
                row[name] = order.choice([i for i, gain in enumerate(gains) if gain == max(gains)])
        missing -= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
        rows.append({name: factors[name][row[name]] for name in names})
    return rows
