"""GGUF files for tests: a small random model, quantized by gguf itself, with a tokenizer of bytes."""

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import pre_tokenizers

LAYERS, HIDDEN, MIDDLE, HEADS, KV_HEADS = 2, 64, 96, 4, 2
END = "</s>"
# In these, as files of many models mix them.
MIXED = {"attn_v": "Q8_0", "ffn_down": "Q5_1", "attn_k": "Q5_0", "ffn_up": "Q4_1", "attn_output": "F16"}


def save_gguf(file: Path, architecture: str = "llama", *, tied: bool = True, **changes: Any) -> Path:
    """A file of random weights: matrices in Q4_0 and what ``MIXED`` says, norms and biases in float32.

    Args:
        file: where to.
        architecture: ``llama``, ``qwen2`` (biases) or ``qwen3`` (norms of heads), or what is to be written as such.
        tied: leave out the head.
        changes: other formats by the tensor's short name, None to leave one out; or an array under a whole name.
    """
    import gguf

    random = np.random.default_rng(0)
    head = 128 if architecture == "qwen3" else HIDDEN // HEADS  # transformers takes its own default for qwen3
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "ab", "abc", END]
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(1024)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MIDDLE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(["a b", "ab c"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add(len(tokens) - 1)
    writer.add_unk_token_id(0)

    def put(name: str, shape: tuple[int, ...]) -> None:
        short = name.split(".")[-2]
        kind = ({} if len(shape) == 1 else {"": "Q4_0"} | MIXED) | changes
        chosen = kind.get(short, kind.get("", "F32"))
        if chosen is None:
            return
        size = 1.0 if len(shape) == 1 else shape[-1] ** -0.5
        data = (random.standard_normal(shape) * size + (name.endswith("norm.weight"))).astype(np.float32)
        quantized = gguf.GGMLQuantizationType[chosen]
        writer.add_tensor(name, gguf.quants.quantize(data, quantized), raw_dtype=quantized)

    put("token_embd.weight", (len(tokens), HIDDEN))
    put("output_norm.weight", (HIDDEN,))
    if not tied:
        put("output.weight", (len(tokens), HIDDEN))
    for layer in range(LAYERS):
        for name, rows in (("attn_q", HEADS * head), ("attn_k", KV_HEADS * head), ("attn_v", KV_HEADS * head)):
            put(f"blk.{layer}.{name}.weight", (rows, HIDDEN))
            if architecture == "qwen2":
                put(f"blk.{layer}.{name}.bias", (rows,))
        if architecture == "qwen3":
            put(f"blk.{layer}.attn_q_norm.weight", (head,))
            put(f"blk.{layer}.attn_k_norm.weight", (head,))
        put(f"blk.{layer}.attn_output.weight", (HIDDEN, HEADS * head))
        put(f"blk.{layer}.attn_norm.weight", (HIDDEN,))
        put(f"blk.{layer}.ffn_norm.weight", (HIDDEN,))
        put(f"blk.{layer}.ffn_gate.weight", (MIDDLE, HIDDEN))
        put(f"blk.{layer}.ffn_up.weight", (MIDDLE, HIDDEN))
        put(f"blk.{layer}.ffn_down.weight", (HIDDEN, MIDDLE))
    for name, array in changes.items():
        if isinstance(array, np.ndarray):
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
