"""What is printed of models with latents, with a tiny one and a clock that counts its readings."""

import itertools

import latent_decode
import pytest
import torch


def test_lines(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    model = latent_decode.latent_model(1, torch.float32, **sizes, intermediate_size=16, vocab_size=32)
    readings = itertools.count()
    times = latent_decode.compare(model, ["exact"], 70, 3, 2, lambda: next(readings))
    assert times == {"DynamicCache": [1] * 6, "exact": [1] * 6}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["DynamicCache", "exact"]
    assert all("1000.00 ms a step     1.00 x DynamicCache (1.00 to 1.00)" in line for line in lines)
