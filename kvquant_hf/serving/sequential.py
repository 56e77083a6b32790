"""Requests of the server in turn, each through a cache of its own: for models that cannot be batched."""

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import HTTPException
from transformers.cli.serving.utils import DirectStreamer, GenerateManager, _GenerationCancelled, _StreamError

from ..cache import QuantizedPagedCache
from ..errors import KVQuantError
from ..reports.report import CacheReport
from ..transformers_api.names import with_cache
from .ledger import Ledger
from .limits import fit
from .options import ServeOptions
from .stops import StopFilter


class SequentialEngine(GenerateManager):
    """transformers' engine that calls ``generate``, with a quantized cache for each call.

    Args:
        options: of the server.
        ledger: told of each token.
    """

    concurrent = 1

    def __init__(self, options: ServeOptions, ledger: Ledger) -> None:
        super().__init__()
        self._options, self._ledger = options, ledger
        self.last: CacheReport | None = None
        self._streamers: dict[str, DirectStreamer] = {}

    def check(self, model: Any) -> None:
        """Say now what the first request would find.

        Raises:
            UnsupportedModelError, UnknownPolicyError, QParamsError: the model has no cache like that.
        """
        self._new_cache(model)

    def _new_cache(self, model: Any) -> QuantizedPagedCache:
        return QuantizedPagedCache(model.config, **self._options.cache_options())

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: Any,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue[Any], DirectStreamer]:
        """As transformers': a queue of pieces of text, and who fills it.

        Raises:
            HTTPException: the request is too long.
        """
        queue: asyncio.Queue[Any] = asyncio.Queue()
        streamer, _ = self._begin(model, processor, inputs, gen_config, request_id, queue.put_nowait, response_parser)
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, Any]:
        """As transformers': text, tokens of the prompt, and the new tokens.

        Raises:
            HTTPException: the request is too long.
            RuntimeError: it failed while it was computed.
        """
        pieces: list[Any] = []
        _, done = self._begin(model, processor, inputs, gen_config, request_id, pieces.append)
        ids = await done
        failures = [item.msg for item in pieces if isinstance(item, _StreamError)]
        if failures or ids is None:
            raise RuntimeError(failures[0] if failures else "the request was ended.")
        text = "".join(x for x in pieces if x is not None)  # without a stop string, which generate keeps
        stops = gen_config.stop_strings
        return text if stops else processor.decode(ids, skip_special_tokens=True), inputs["input_ids"].shape[-1], ids

    def _begin(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: Any,
        request_id: str,
        sink: Callable[[Any], None],
        parser: Any = None,
    ) -> tuple[DirectStreamer, "asyncio.Future[Any]"]:
        """Put a request behind those before it; the future has the new tokens, or None if it was cancelled."""
        prompt = inputs["input_ids"].shape[-1]
        fit(prompt, gen_config, _longest(model))
        try:
            cache = self._new_cache(model)
        except KVQuantError as error:  # of another model than the server's, which was looked at before
            raise HTTPException(400, str(error)) from error
        stops = gen_config.stop_strings or ()
        entry = self._ledger.live[request_id]
        entry.prompt_tokens = prompt
        loop = asyncio.get_running_loop()
        passing = StopFilter(sink, [stops] if isinstance(stops, str) else stops)

        def count(item: Any) -> None:
            entry.grown(streamer.total_tokens)
            passing.put_nowait(item)

        tokenizer = getattr(processor, "tokenizer", processor)._tokenizer
        streamer = DirectStreamer(tokenizer, loop, _Queue(count), response_parser=parser)
        self._streamers[request_id] = streamer

        def run() -> Any:
            options: dict[str, Any] = {**inputs, **with_cache(cache), "streamer": streamer, "tokenizer": processor}
            if hasattr(model, "has_talker"):
                options["generation_mode"] = "text"
            try:
                output = model.generate(**options, generation_config=gen_config)
                entry.outcome = "finished"
                return output[0, prompt:].tolist()
            except _GenerationCancelled:
                loop.call_soon_threadsafe(sink, None)
                return None
            except Exception as error:
                entry.outcome = "failed"
                loop.call_soon_threadsafe(sink, _StreamError(str(error).replace('"', "'")))
                return None
            finally:
                self.last = cache.report()
                self._streamers.pop(request_id, None)

        return streamer, self.async_submit(run)

    def report(self) -> CacheReport | None:
        """The cache of the newest request; None before the first."""
        return self.last

    def is_alive(self) -> bool:
        """A request that fails does not end the others."""
        return True

    def release(self, request_id: str) -> None:
        """A request's connection is over: if its answer is not, it ends at its next token."""
        streamer = self._streamers.get(request_id)
        if streamer is not None:
            streamer.cancel()


def _longest(model: Any) -> int:
    """Tokens that a model has positions for."""
    decoder = model.config.get_text_config(decoder=True)
    return getattr(decoder, "max_position_embeddings", None) or 2**31


class _Queue:
    """What transformers' streamer puts pieces into, from the loop."""

    def __init__(self, take: Callable[[Any], None]) -> None:
        self.put_nowait = take
