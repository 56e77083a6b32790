"""Tiny random models, one builder per architecture; every builder takes changes to its config."""

from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 97
PAD = 0
# Weights ten times larger than usual: attention is then sharp enough for a wrong key to change the next token.
INIT_RANGE = 0.2

_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": INIT_RANGE,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}


def build(name: str, options: dict[str, Any], seed: int = 0, attention: str | None = None) -> PreTrainedModel:
    """``transformers.<name>ForCausalLM`` (or ``name`` itself) with random weights from ``seed``, in evaluation mode."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name.removesuffix('ForConditionalGeneration')}Config")(**options)
    if attention is not None:
        config._attn_implementation = attention
    suffix = "" if name.endswith("Generation") else "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    model = getattr(transformers, name + suffix)(config)
    model.generation_config.eos_token_id = None  # every sequence as long as asked for
    model.generation_config.pad_token_id = PAD
    return model.eval()


def tiny_llama(seed: int = 0, attention: str | None = None, **changes: Any) -> PreTrainedModel:
    """Llama: 3 layers, 4 query heads on 2 key/value heads, head_dim 32."""
    return build("Llama", _DECODER | changes, seed, attention)


def tiny_qwen2(seed: int = 0, attention: str | None = None, **changes: Any) -> PreTrainedModel:
    """Qwen2: as Llama, with biases on queries, keys and values."""
    model = build("Qwen2", {k: v for k, v in _DECODER.items() if k != "head_dim"} | changes, seed, attention)
    for name, parameter in model.named_parameters():
        if name.endswith("proj.bias"):  # zero after initialisation, and large in real Qwen models
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def tiny_gemma2(seed: int = 0, attention: str | None = None, **changes: Any) -> PreTrainedModel:
    """Gemma2: softcap, and sliding layers (window 24) in turn with full ones."""
    options = {
        "num_hidden_layers": 4,
        "sliding_window": 24,
        "attn_logit_softcapping": 20.0,
        "query_pre_attn_scalar": 32,
    }
    return build("Gemma2", _DECODER | options | changes, seed, attention)


def tiny_gpt2(seed: int = 0, attention: str | None = None, **changes: Any) -> PreTrainedModel:
    """GPT-2: learned positions, no GQA."""
    options = {"vocab_size": VOCAB, "n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 512}
    tokens = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": PAD, "initializer_range": INIT_RANGE}
    return build("GPT2", options | tokens | changes, seed, attention)


def tiny_falcon(seed: int = 0, attention: str | None = None, **changes: Any) -> PreTrainedModel:
    """Falcon: an attention module of its own that knows no attention interface; one key/value head."""
    options = {k: v for k, v in _DECODER.items() if k not in ("intermediate_size", "num_key_value_heads", "head_dim")}
    return build("Falcon", options | changes, seed, attention)


def tiny_t5(seed: int = 0, attention: str | None = None, **changes: Any) -> PreTrainedModel:
    """T5: encoder and decoder, scores with a position bias and no scale."""
    options = {"vocab_size": VOCAB, "d_model": 64, "d_kv": 32, "d_ff": 64, "num_layers": 3, "num_heads": 4}
    tokens = {"decoder_start_token_id": 1, "eos_token_id": None, "pad_token_id": PAD, "tie_word_embeddings": False}
    model = build("T5ForConditionalGeneration", options | tokens | changes, seed, attention)
    # Tied to the embedding, which is large here, it would repeat its last token for ever.
    model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, 64))
    return model


DECODERS: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": tiny_llama,
    "qwen2": tiny_qwen2,
    "gemma2": tiny_gemma2,
    "gpt2": tiny_gpt2,
    "falcon": tiny_falcon,
}


def prompt(batch: int = 1, length: int = 70, seed: int = 0) -> torch.Tensor:
    """Random token ids ``[batch, length]`` without special tokens."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def ragged_prompts(lengths: tuple[int, ...] = (70, 69, 30, 1)) -> dict[str, torch.Tensor]:
    """Left-padded prompts of different lengths, with their mask."""
    ids = prompt(len(lengths), max(lengths))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : max(lengths) - length] = PAD
        mask[row, : max(lengths) - length] = 0
    return {"input_ids": ids, "attention_mask": mask}


def chapters(minimum: int) -> list[str]:
    """Chapters of the Python language reference with at least ``minimum`` characters, by name."""
    return [text for _, text in sorted(topics.items()) if len(text) >= minimum]
