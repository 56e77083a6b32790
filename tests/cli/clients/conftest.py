"""A server of ``kvquant serve`` with a model whose answers are letters."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cli.clients.asking import KEY
from command import byte_tokenizer
from models import build

from kvquant_hf.batching.hooks import unsupported

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="session")
def lettered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama that says nothing but the letters a to z, and never ends by itself."""
    folder = tmp_path_factory.mktemp("lettered")
    tokenizer = byte_tokenizer(pad_token="</s>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "tie_word_embeddings": False}
    model = build("Llama", sizes | tokens | {"initializer_range": 0.2, "max_position_embeddings": 4096})
    letters = torch.tensor(tokenizer.convert_tokens_to_ids([chr(code) for code in range(ord("a"), ord("z") + 1)]))
    rows = model.lm_head.weight.data
    kept = rows[letters].clone()
    rows.zero_()
    rows[letters] = kept
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def served(lettered: Path) -> Iterator[object]:
    """A server with that model, int4, that wants a key."""
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    pytest.importorskip("prometheus_client", reason="the extra serve is not installed")
    if unsupported():
        pytest.skip("this transformers is too old for a server")
    from kvquant_hf.clients.server import started

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with started([str(lettered), "--policy", "int4", "--kv-budget", "20MB", "--prefill", "quantized"], KEY) as server:
        yield server
