"""The command line in tests: what a run gives back, and a model small enough for any command."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


def is_one_sentence(text: str) -> bool:
    return text.startswith("kvquant: ") and text.count("\n") == 1


def byte_tokenizer(**options: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are bytes, 256 of them, and ``</s>``."""
    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet | {"</s>": len(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **options)


def save_tiny_model(folder: Path) -> Path:
    """A random Llama of two layers and the byte tokenizer, in a folder."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    eos = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=eos + 1,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
