"""A server in a thread of this process, with a model whose tokens are printable characters."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import openai
import torch
import uvicorn
from models import tiny_llama
from stores import seeing_no_queries
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from transformers import GenerationConfig, PreTrainedTokenizerFast

from kvquant_hf import QuantizedPagedCache
from kvquant_hf.serving.application import Application
from kvquant_hf.serving.options import ServeOptions
from kvquant_hf.transformers_api.names import with_cache

NAME = "tiny"
CHARACTERS = [chr(i) for i in range(32, 127)]
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }} {% endfor %}"


class Served(NamedTuple):
    """A server: its application, its address, and a client of it."""

    app: Application
    url: str
    client: openai.OpenAI
    model: Any
    tokenizer: Any

    def app_address(self) -> tuple[str, int]:
        """For a socket."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)


def wait_until(met: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for something to come about.

    Raises:
        AssertionError: it does not.
    """
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.01)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are printable characters, and one more that ends an answer."""
    vocabulary = {char: i for i, char in enumerate(CHARACTERS)} | {"</s>": 95, "<unk>": 96}
    tokenizer = Tokenizer(token_models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )


def tiny_model() -> Any:
    """A random Llama, greedy by default, that never ends by itself."""
    model = tiny_llama(max_position_embeddings=512)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=95, pad_token_id=95, suppress_tokens=[95, 96]
    )
    return model


@contextlib.contextmanager
def listening(app: Any) -> Iterator[str]:
    """Serve an application until the end of the block; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=2))
        started = threading.Event()
        startup = server.startup

        async def told(sockets: Any = None) -> None:
            await startup(sockets)
            started.set()

        server.startup = told
        thread = threading.Thread(target=server.run, kwargs={"sockets": [free]})
        thread.start()
        try:
            assert started.wait(30), "the server does not start"
            yield f"http://127.0.0.1:{free.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@contextlib.contextmanager
def serving(model: Any = None, tokenizer: Any = None, **options: Any) -> Iterator[Served]:
    """A server of a model, the tiny one by default; at its end no page may be in use."""
    model = tiny_model() if model is None else model
    tokenizer = character_tokenizer() if tokenizer is None else tokenizer
    app = Application(NAME, model, tokenizer, ServeOptions(**options))
    try:
        with listening(app) as url:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key=options.get("api_key") or "none", max_retries=0)
            with client:
                yield Served(app, url, client, model, tokenizer)
    finally:
        app.engine.stop()


def alone(model: Any, tokenizer: Any, text: str, new: int, policy: str, **settings: Any) -> str:
    """The answer to a chat of one message by ``generate``, with no one beside it.

    Args:
        model: not the one that a server has, whose attention function belongs to the server.
        tokenizer: its tokenizer.
        text: the message.
        new: tokens of the answer.
        policy: how the cache is stored.
        settings: of the cache; without first tokens that are exact, as in a batch, unless they say otherwise.  And then
            keys are rounded to the nearest codes, as there.
    """
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    cache = QuantizedPagedCache(model.config, policy, **({"sinks": 0} | settings))
    with torch.no_grad(), seeing_no_queries() if "sinks" not in settings else contextlib.nullcontext():
        output = model.generate(**prompt, **with_cache(cache), max_new_tokens=new, do_sample=False)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
