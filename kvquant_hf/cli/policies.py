"""``kvquant policies``: what each policy stores and what a token costs, from the codecs' own declarations.

Nothing is measured here and no weights are read: the numbers are those of full pages, for one model shape.
"""

from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import typer

from ..policies.cost import page_cost
from ..policies.table import POLICIES
from ..triton_kernels.codecs import CODECS
from .models import check_cache_options, load_config, locate
from .terminal import InputError, print_json

PAGE_SIZE = 64


class Shape(NamedTuple):
    """What of a model decides its bytes per token."""

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    value_head_dim: int

    def __str__(self) -> str:
        values = f", values {self.value_head_dim}" if self.value_head_dim != self.head_dim else ""
        return f"{self.name}: {self.layers} layers, {self.kv_heads} KV heads, head_dim {self.head_dim}{values}"


class Row(NamedTuple):
    """One policy; ``bytes_per_token`` is over all layers and heads, ``ratio`` against 16 bit."""

    policy: str
    keys: str
    values: str
    bits_per_element: float
    bytes_per_token: float
    ratio: float
    source: str


LLAMA_3_8B = Shape("Llama-3-8B", 32, 8, 128, 128)


def rows(shape: Shape = LLAMA_3_8B, page_size: int = PAGE_SIZE) -> Iterator[Row]:
    """A row per policy; those that cannot store ``shape``'s head_dim are left out."""
    for name, policy in POLICIES.items():
        keys, values = CODECS[policy.keys], CODECS[policy.values]
        if shape.head_dim % keys.head_dim_multiple or shape.value_head_dim % values.head_dim_multiple:
            continue
        cost = page_cost(
            policy, shape.head_dim, value_head_dim=shape.value_head_dim, heads=shape.kv_heads, page_size=page_size
        )
        source = "; ".join(dict.fromkeys((keys.source, values.source)))
        stored = shape.layers * cost.bytes_per_token
        yield Row(name, policy.keys, policy.values, cost.bits_per_element, stored, cost.ratio, source)


def markdown_table(shape: Shape = LLAMA_3_8B, page_size: int = PAGE_SIZE) -> str:
    """The table as the README shows it."""
    lines = [
        "| policy | keys | values | bits/element | bytes/token | ratio to 16 bit | source |",
        "|---|---|---|--:|--:|--:|---|",
    ]
    lines += [
        f"| `{row.policy}` | {CODECS[row.keys].summary} | {CODECS[row.values].summary} | {row.bits_per_element:.2f} "
        f"| {row.bytes_per_token:,.0f} | {row.ratio:.2f} | {row.source} |"
        for row in rows(shape, page_size)
    ]
    return "\n".join(lines)


def shape_of(name: str, config: Any) -> Shape:
    """The shape of a model's paged layers.

    Raises:
        UnsupportedModelError: it has no full-attention layer.
    """
    from ..cache import QuantizedPagedCache

    layers = len(QuantizedPagedCache(config, "exact").paged_layers)
    decoder = config.get_text_config(decoder=True)
    heads = decoder.num_attention_heads
    head_dim = getattr(decoder, "head_dim", None) or decoder.hidden_size // heads
    kv_heads = getattr(decoder, "num_key_value_heads", None) or heads
    return Shape(name, layers, kv_heads, head_dim, head_dim)


def policies(
    model: Annotated[
        str | None, typer.Option(help="Folder, .gguf file or hub name whose shape to use; only its config is read.")
    ] = None,
    head_dim: Annotated[int, typer.Option(min=1, help="Elements per key or value vector.")] = LLAMA_3_8B.head_dim,
    kv_heads: Annotated[int, typer.Option(min=1, help="Key/value heads per layer.")] = LLAMA_3_8B.kv_heads,
    layers: Annotated[int, typer.Option(min=1, help="Layers.")] = LLAMA_3_8B.layers,
    page_size: Annotated[int, typer.Option(help="Tokens per page, a multiple of 8.")] = PAGE_SIZE,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="The table as Markdown.")] = False,
) -> None:
    """List the policies and what a token costs in each.

    The default shape is Llama-3-8B's.
    """
    if as_json and markdown:
        raise InputError("--json and --markdown exclude each other.")
    check_cache_options("exact", page_size)
    if model is not None:
        shape = shape_of(locate(model).description, load_config(model))
    else:
        shape = Shape("a model", layers, kv_heads, head_dim, head_dim)
        if shape[1:] == LLAMA_3_8B[1:]:
            shape = LLAMA_3_8B
    if as_json:
        table = {
            row.policy: row._asdict() | {"summary": POLICIES[row.policy].summary} for row in rows(shape, page_size)
        }
        print_json(shape._asdict() | {"page_size": page_size, "policies": table})
    elif markdown:
        print(markdown_table(shape, page_size))
    else:
        _print_tables(shape, page_size)


def _print_tables(shape: Shape, page_size: int) -> None:
    """Policies, then the codecs that they name, as wide as a terminal of 80 columns."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"{shape}; pages of {page_size} tokens", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("policy", "keys", "values"):
        table.add_column(heading, no_wrap=True)
    for heading in ("bits/element", "bytes/token", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows(shape, page_size):
        numbers = (f"{row.bits_per_element:.2f}", f"{row.bytes_per_token:,.0f}", f"{row.ratio:.2f}x")
        table.add_row(row.policy, row.keys, row.values, *numbers)
    console.print(table)
    console.print("\nbytes/token: all layers and heads, scales included; ratio: to 16 bit\n", highlight=False)
    codecs = Table("codec", "stores", "source", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for codec in CODECS.values():
        codecs.add_row(codec.name, codec.summary, codec.source)
    console.print(codecs)
