"""Two servers behind one address on one node, by Ray Serve: the answers are one server's, from both."""

import asyncio
import importlib.util
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from command import save_tiny_model
from serving.servers import wait_until
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvquant_hf import QuantizedPagedCache
from kvquant_hf.transformers_api.names import with_cache

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
]
PROMPTS = [f"prompt {i} " + "and more " * (i % 4) for i in range(8)]  # shorter than a page, which would be shared
NEW = 20


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def url(folder: Path) -> Any:
    """The address of two replicas; they end as a person would end them."""
    options = [
        "--policy",
        "int4",
        "--kv-budget",
        "2MB",
        "--replicas",
        "2",
        "--port",
        str(free_port()),
        "--name",
        "tiny",
    ]
    command = [sys.executable, "-c", "from kvquant_hf.cli import main; main()", "serve", str(folder), *options]
    command += ["--port", str(free_port())]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        try:
            assert running.stderr is not None
            lines = [""]
            while not lines[-1].startswith("serving"):
                lines.append(running.stderr.readline())
                assert lines[-1], "".join(lines)
            said = lines[-1]
            assert said.startswith("serving tiny from 2 replicas at http://127.0.0.1:")
            yield said.split()[-1]
            running.send_signal(signal.SIGINT)
            assert running.wait(60) == 0
            assert running.stderr.read().splitlines()[-1] == "stopped."
        finally:
            running.kill()


def test_ray_knows_the_setting_by_its_name() -> None:
    """With its own 5 s it starts on a quiet machine too, so nothing else would tell."""
    from kvquant_hf.serving.replicas import _STARTING

    show = "from ray.serve._private import constants; print(constants.PROXY_READY_CHECK_TIMEOUT_S)"
    command, environment = [sys.executable, "-c", show], os.environ | _STARTING
    assert float(subprocess.run(command, env=environment, capture_output=True, check=True).stdout) == 60


def reports(url: str) -> dict[str, dict[str, Any]]:
    """What each replica says; whoever is asked answers for itself."""
    found: dict[str, dict[str, Any]] = {}

    def both() -> bool:
        with httpx.Client() as client:  # a new connection, so that another one may answer
            report = client.get(f"{url}/kvquant/report").json()
        found[report["replica"]] = report
        return len(found) == 2

    wait_until(both)
    return found


def tokens_of(folder: Path) -> list[list[int]]:
    """The new tokens of each prompt by ``generate`` alone."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        cache = with_cache(QuantizedPagedCache(model.config, "int4", sinks=0))
        output = model.generate(**inputs, **cache, max_new_tokens=NEW, do_sample=False)
        found.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    return found


def test_both_answer_as_one(url: str, folder: Path) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

            async def one(i: int, stream: bool) -> str:
                prompt = PROMPTS[i % len(PROMPTS)]
                answer = await client.completions.create(
                    model="tiny", prompt=prompt, max_tokens=NEW, temperature=0, stream=stream
                )
                if stream:
                    return "".join([chunk.choices[0].text async for chunk in answer])
                return answer.choices[0].text

            return list(await asyncio.gather(*(one(i, stream=False) for i in range(24)), one(0, stream=True)))

    *answers, streamed = asyncio.run(ask())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in tokens_of(folder)]
    assert answers == expected * 3
    assert streamed.rstrip("�") == expected[0].rstrip("�"), "a character that is not whole is not streamed"
    assert sum(report["requests"]["finished"] for report in reports(url).values()) == 25

    def both() -> bool:
        """Who is asked is Ray's choice; each is, in time."""
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
        return all(report["requests"]["finished"] for report in reports(url).values())

    wait_until(both)


def test_who_goes_away_leaves_nothing_in_either(url: str) -> None:
    def ended() -> Counter[str]:
        """Requests by what became of them, in both."""
        return sum((Counter(report["requests"]) for report in reports(url).values()), Counter())

    before = ended()
    for _ in range(4):
        body = {"model": "tiny", "prompt": "x", "max_tokens": 900, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body) as answer:
            next(answer.iter_text())

    def over() -> bool:
        free = not any(report["cache"]["used_blocks"] for report in reports(url).values())
        new = ended() - before
        return free and new["cancelled"] + new["finished"] == 4  # a fast one may be done before it is known

    wait_until(over)
    assert ended()["cancelled"] > before["cancelled"]


def test_errors_pass_through(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="n: input should be 1"):
            client.completions.create(model="tiny", prompt="x", n=2)
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="other", prompt="x")
