"""Error budgets: how far a result may be from its float64 reference, computed from sizes and magnitudes.

The model of rounding is the usual one for random signs: a sum of n terms, whose partial sums are about as large as the
2-norm m of its terms, is off by about sqrt(n) u m, with u the unit roundoff; four times that is practically never
exceeded (Higham and Mary, SIAM J. Sci. Comput. 41 (2019), 2815).  The budgets come out near 1e-5 of the result, where a
wrong scale, a page too many or a mask off by one shows at 1e-3 and above.
"""

import torch

from kvquant_hf.triton_kernels.ops import PagedSide

SAFETY = 4.0


def magnitudes(side: PagedSide, page_table: torch.Tensor) -> torch.Tensor:
    """What the folded arithmetic adds up for each element, in the codec's domain: |level * scales| + |offsets|.

    ``[batch, heads, tokens, head_dim]`` float64.  Larger than the element itself where an offset cancels a level.
    """
    parts = []
    if page_table.shape[1]:
        tile = side.codec.tile([plane[page_table].transpose(1, 2) for plane in side.planes])
        absolute = type(tile)(*(None if part is None else part.double().abs() for part in tile))
        parts.append(absolute.dense().flatten(2, 3))
    parts.append(side.tail.double().abs())
    return torch.cat(parts, dim=2)


def attention_budget(
    query: torch.Tensor,
    keys: PagedSide,
    values: PagedSide,
    page_table: torch.Tensor,
    weights: torch.Tensor,
    reference: torch.Tensor,
    *,
    scale: float,
    other_scores: float = 0.0,
) -> torch.Tensor:
    """Bound on ``|output - reference|_2`` of each row, ``[batch, query_heads, queries]`` float64.

    Three parts:

    * the score of token t is a sum of 2 D products and offsets, off by d_t; that moves its weight by the factor e^d_t,
      and the weighted mean o by no more than sum_t p_t d_t (|v_t| + |o|).  Where the codec rotates, every rotated
      coordinate is one more sum of D terms, which makes u |q| |k_t| in the score;
    * the weighted sum and the sum of weights have as many terms as there are tokens, and rotating the result back D;
    * the output is rounded to the query's dtype.

    Args:
        query: as attended with, in its own dtype.
        keys: packed and open keys.
        values: packed and open values.
        page_table: as attended with.
        weights: softmax weights in float64, ``[batch, query_heads, queries, tokens]``.
        reference: the float64 result.
        scale: as attended with.
        other_scores: largest finite mask, sink or softcap, which is added to scores in float32.
    """
    # float64 queries too: decode(), which the reference comes from, multiplies in float32 where attention folds.
    unit = torch.finfo(torch.float32).eps / 2
    group = query.shape[1] // keys.tail.shape[1]
    k, v = (magnitudes(side, page_table).repeat_interleave(group, 1) for side in (keys, values))
    tokens, key_dim, value_dim = k.shape[2], k.shape[3], v.shape[3]
    q = query.double() * scale
    length = v.norm(dim=-1).unsqueeze(-2)
    terms = (keys.codec.to_domain(q).square() @ k.square().transpose(-1, -2)).sqrt()
    if keys.codec.rotated:
        terms = torch.maximum(terms, (q.square() @ k.square().transpose(-1, -2)).sqrt())  # the open page is not rotated
        terms = terms + q.norm(dim=-1, keepdim=True) * k.norm(dim=-1).unsqueeze(-2)
    score_error = (2 * key_dim) ** 0.5 * terms + other_scores + 2  # the 2: exp, and the difference to the maximum
    scoring = (weights * score_error * (length + reference.norm(dim=-1, keepdim=True))).sum(-1)
    weighing = (2 * tokens**0.5 + value_dim**0.5) * (weights * length).sum(-1)
    rounding = torch.zeros_like(weighing)
    if query.dtype != torch.float64:
        info = torch.finfo(query.dtype)
        rounding = info.eps * (reference.norm(dim=-1) + info.smallest_normal * value_dim**0.5)
    return SAFETY * unit * (scoring + weighing) + rounding


# Standard deviation of the error of one stored coordinate, relative to that of the coordinate, for Gaussian vectors.
# Integers: a range of 64 tokens, or of a vector of 32 channels, is about 5 standard deviations wide, which makes a step
# of 5 / (2^b - 1) and an error of step / sqrt(12).  Lloyd-Max: the square root of the known distortion.
_INTEGER = {bits: 5 / (2**bits - 1) / 12**0.5 for bits in (4, 8)}
_LLOYD = {2: 0.1175**0.5}
RELATIVE_NOISE: dict[str, tuple[float, float]] = {  # keys, values
    "int8": (_INTEGER[8], _INTEGER[8]),
    "int4": (_INTEGER[4], _INTEGER[4]),
    "turboquant": (_INTEGER[4], _LLOYD[2]),
}
