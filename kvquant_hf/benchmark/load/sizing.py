"""One budget of bytes for the keys and values of all servers, and what each makes of it.

transformers' server is told a number of blocks (``--cb-num-blocks``).  For a model whose layers all see all tokens, a
block is ``page_size`` tokens of every layer, keys and values, in the model's dtype:

    bytes of a block = page_size * layers * 2 * key/value heads * head_dim * bytes of an element

Two more blocks, which it never hands out, are not counted against it; our servers count theirs in the budget.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from ...errors import BenchmarkInputError
from ...policies.cost import page_cost
from ..contenders import PAGE_SIZE, Dimensions
from ..serving.workload import Request
from .gate import OUTPUT_TOKENS, PROMPT_TOKENS


def dense_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Bytes of a token's keys and values in all layers, in ``dtype``."""
    dims = Dimensions.of(config)
    return dims.layers * dims.elements_per_token() * dtype.itemsize


def mean_tokens(requests: Sequence[Request]) -> float:
    """Tokens that a request holds at its end, prompt and answer, on the average."""
    return sum(request.prompt_tokens + request.output_tokens for request in requests) / len(requests)


def longest_request(requests: Sequence[Request]) -> int:
    """Tokens of the longest request that servers get, those of the check before the load included."""
    return max(PROMPT_TOKENS + OUTPUT_TOKENS, *(request.prompt_tokens + request.output_tokens for request in requests))


def budget_for(times: float, requests: Sequence[Request], bytes_per_token: int, stock_page_size: int) -> int:
    """Bytes of ``times`` average requests in the model's dtype, rounded up to whole blocks of transformers' server."""
    return math.ceil(times * mean_tokens(requests) / stock_page_size) * stock_page_size * bytes_per_token


def check_budget(budget: int, requests: Sequence[Request], bytes_per_token: int, stock_page_size: int) -> None:
    """Refuse a budget in which transformers' server could not hold the longest request, which would wait for ever.

    Raises:
        BenchmarkInputError: it is such a budget.
    """
    longest = longest_request(requests)
    needed = math.ceil(longest / stock_page_size) * stock_page_size * bytes_per_token
    if budget < needed:
        raise BenchmarkInputError(
            f"a request of {longest} tokens takes {needed:,} bytes in transformers' blocks and the budget is "
            f"{budget:,}; use a larger --kv-budget or smaller --max-prompt and --max-output."
        )


def stock_blocks(budget: int, bytes_per_token: int, stock_page_size: int) -> int:
    """Blocks of transformers' server that ``budget`` bytes hold."""
    return budget // (bytes_per_token * stock_page_size)


def fitting_requests(
    budget: int, policy: str, config: Any, dtype: torch.dtype, requests: Sequence[Request], page_size: int = PAGE_SIZE
) -> int:
    """Requests that one of our servers should let hold pages at a time: as many as fill ``budget`` if each has an open
    page and, as at its end, its sealed pages.  At least one, and at most all.

    The server's own default keeps a quarter of the budget for open pages, which suits requests of some 600 tokens.
    """
    dims = Dimensions.of(config)
    open_page = page_size * dense_bytes_per_token(config, dtype)
    cost = page_cost(policy, dims.head_dim, heads=dims.kv_heads, page_size=page_size, dtype=dtype)
    sealed_page = page_size * cost.bytes_per_token * dims.layers
    sealed = sum((r.prompt_tokens + r.output_tokens - 1) // page_size for r in requests) / len(requests)
    return min(len(requests), max(1, int((budget - 2 * sealed_page) / (open_page + sealed * sealed_page))))
