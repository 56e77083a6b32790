"""What a GGUF file calls the tensors of a decoder, and where transformers has them.

Source: the tensor names of llama.cpp's ``gguf-py/gguf/constants.py``; the rows of ``q`` and ``k`` of its architecture
``llama`` are ordered for rotary embeddings of neighbouring elements, those of transformers for halves.
"""

import re

import torch

# Architectures of a file whose tensors are those of transformers under other names, q and k of PAIRED reordered.
ARCHITECTURES = ("llama", "qwen2", "qwen3")
PAIRED = ("llama",)

_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_OF_A_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<tensor>\w+)\.(?P<kind>weight|bias)")


def parameter_name(name: str) -> str | None:
    """transformers' name of the tensor that a file calls ``name``; None if there is none."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    layer, tensor, kind = found.group("layer", "tensor", "kind")
    place = (_WHOLE if layer is None else _OF_A_LAYER).get(tensor)
    if place is None:
        return None
    return f"{place}.{kind}" if layer is None else f"model.layers.{layer}.{place}.{kind}"


def halves_order(rows: int, heads: int) -> torch.Tensor:
    """Which row of a file's ``q`` or ``k`` with ``heads`` heads each of transformers' is, ``[rows]`` int64."""
    return torch.arange(rows).reshape(heads, -1, 2).transpose(1, 2).reshape(-1)
