"""Tiny random models, one builder per architecture; every builder takes changes to its config."""

from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.gpt2 import modeling_gpt2 as gpt2

VOCAB = 97
PAD = 0
# Weights ten times larger than usual: attention is then sharp enough for a wrong key to change the next token.
INIT_RANGE = 0.2

OWN = "own"


def own_attention(*args: Any, **kwargs: Any) -> Any:
    """An attention function that knows nothing of pages, as a user may register one: they are multiplied out for it."""
    groups = hasattr(args[0], "num_key_value_groups")
    return (gemma2 if groups else gpt2).eager_attention_forward(*args, **kwargs)


AttentionInterface.register(OWN, own_attention)
AttentionMaskInterface.register(OWN, eager_mask)

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
    kind = name.removesuffix("ForConditionalGeneration")
    kind += "TextConfig" if kind in ("Gemma3", "Gemma4", "Llama4") else "Config"
    config = getattr(transformers, kind)(**options)
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


_SMALL = _DECODER | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
_IN_TURN = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 24}
# All experts take part: a router that leaves some out would turn a rounding error into another expert.
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 2}

# Decoders with a window of 24 tokens, or chunks of 24.
WINDOWED: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", {"sliding_window": 24}),  # every layer
    "gemma2": ("Gemma2", _IN_TURN | {"attn_logit_softcapping": 20.0, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3", _IN_TURN | {"query_pre_attn_scalar": 16}),
    "gpt-oss": ("GptOss", _IN_TURN | _EXPERTS),
    "cohere2": ("Cohere2", _IN_TURN | {"logit_scale": 1.0}),
    "qwen2": ("Qwen2", _IN_TURN | {"use_sliding_window": True}),
    "llama4": (
        "Llama4",
        _EXPERTS
        | {
            "num_hidden_layers": 4,
            "layer_types": ["chunked_attention", "chunked_attention", "full_attention", "chunked_attention"],
            "no_rope_layers": [1, 1, 0, 1],
            "attention_chunk_size": 24,
            "intermediate_size_mlp": 64,
            "attn_temperature_tuning": False,
        },
    ),
}


def tiny_windowed(name: str, seed: int = 0, attention: str | None = None, **changes: Any) -> PreTrainedModel:
    """One of ``WINDOWED``: 2 or 4 layers, 4 query heads on 2 key/value heads, head_dim 16."""
    architecture, options = WINDOWED[name]
    base = {k: v for k, v in _SMALL.items() if k != "head_dim" or name not in ("qwen2", "cohere2")}
    model = build(architecture, base | options | changes, seed, attention)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):  # zero or unset after initialisation
            torch.nn.init.normal_(parameter)
    return model


_NO_HEAD_DIM = {k: v for k, v in _SMALL.items() if k != "head_dim"}

# Decoders whose layers are not all alike, or whose cache does not hold keys and values.
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-next": (  # linear attention and full attention
        "Qwen3Next",
        _SMALL
        | {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
        | {"shared_expert_intermediate_size": 32, "linear_num_value_heads": 4, "linear_num_key_heads": 2}
        | {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
        | {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2},
    ),
    "lfm2": (  # short convolutions and full attention
        "Lfm2",
        _NO_HEAD_DIM | {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2, "conv_L_cache": 3},
    ),
    "gemma4": (  # the last two layers read the keys and values of those before them
        "Gemma4",
        _SMALL
        | {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 24}
        | {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 16}
        | {"global_head_dim": 32},
    ),
    "deepseek-v3": (  # MLA: latents of 32 and rotary keys of 8
        "DeepseekV3",
        _NO_HEAD_DIM
        | {"n_routed_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}
        | {"n_shared_experts": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4, "q_lora_rank": 24}
        | {"kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16},
    ),
}


def tiny_hybrid(name: str, seed: int = 0, attention: str | None = None, **changes: Any) -> PreTrainedModel:
    """One of ``HYBRIDS``."""
    architecture, options = HYBRIDS[name]
    return build(architecture, options | changes, seed, attention)


_BART = {"vocab_size": VOCAB, "d_model": 64, "encoder_layers": 2, "decoder_layers": 3, "init_std": INIT_RANGE}
_BART |= {f"{half}_attention_heads": 4 for half in ("encoder", "decoder")}
_BART |= {f"{half}_ffn_dim": 64 for half in ("encoder", "decoder")}
_BART |= {"decoder_start_token_id": 1, "eos_token_id": None, "pad_token_id": PAD, "tie_word_embeddings": False}


def _tiny_bart(name: str, attention: str | None, **changes: Any) -> PreTrainedModel:
    model = build(f"{name}ForConditionalGeneration", _BART | changes, 0, attention)
    model.set_output_embeddings(torch.nn.Linear(64, VOCAB, bias=False))  # tied, it would repeat its last token
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.5)
    settings = model.generation_config
    settings.forced_eos_token_id = settings.forced_bos_token_id = settings.suppress_tokens = None
    return model


def tiny_bart(attention: str | None = None) -> PreTrainedModel:
    """BART: encoder of 2 layers, decoder of 3."""
    return _tiny_bart("Bart", attention)


def tiny_whisper(attention: str | None = None) -> PreTrainedModel:
    """Whisper: reads features ``[batch, 8, 80]``, which makes 40 tokens for the cross attention."""
    return _tiny_bart("Whisper", attention, num_mel_bins=8, max_source_positions=40, max_target_positions=128)


def tiny_t5gemma(attention: str | None = None) -> PreTrainedModel:
    """T5Gemma: a decoder with sliding layers and cross attention."""
    options = _SMALL | {"sliding_window": 24, "query_pre_attn_scalar": 16}
    options |= {"layer_types": ["sliding_attention", "full_attention"]}
    halves = {name: transformers.T5GemmaModuleConfig(**options) for name in ("encoder", "decoder")}
    tokens = {"vocab_size": VOCAB, "eos_token_id": None, "pad_token_id": PAD, "bos_token_id": 1}
    model = build("T5GemmaForConditionalGeneration", {**halves, **tokens, "tie_word_embeddings": False}, 0, attention)
    model.generation_config.decoder_start_token_id = 1
    return model


def tiny_llava(attention: str | None = None) -> PreTrainedModel:
    """LLaVA: Llama with images ``[batch, 3, 8, 8]``, each four tokens of the prompt (token 96)."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4, "projection_dim": 32}
    options = {
        "text_config": transformers.LlamaConfig(**_SMALL),
        "vision_config": transformers.CLIPVisionConfig(**vision),
        "image_token_index": VOCAB - 1,
    }
    model = build("LlavaForConditionalGeneration", options, 0, attention)
    model.generation_config.suppress_tokens = [VOCAB - 1]  # it would ask for an image
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
