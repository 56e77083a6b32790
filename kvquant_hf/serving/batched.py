"""Requests of the server in continuous batching: each with its own settings, its limits, and its end."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import HTTPException
from transformers.cli.serving.utils import CBGenerateManager, CBStreamer, CBWorkerDeadError, _StreamError

from ..batching.report import BatchingReport
from ..batching.sizing import longest_request
from ..errors import KVQuantError, UnsupportedModelError
from .ledger import Ledger
from .limits import fit
from .options import ServeOptions
from .stops import StopFilter


class BatchedEngine(CBGenerateManager):
    """transformers' link between handlers and a batching manager; the manager is ours, and runs from the beginning.

    Args:
        model: the model.
        options: of the server.
        ledger: told of each token.

    Raises:
        UnsupportedModelError: the model cannot be batched.
        OutOfPages: the budget has no room.
    """

    def __init__(self, model: Any, options: ServeOptions, ledger: Ledger) -> None:
        config = options.batching_config()
        super().__init__(cb_config=config)
        self.model = model
        self._ledger = ledger
        self._ended: set[str] = set()  # cancelled ones, of which a last output may be on its way
        self._cb = model.init_continuous_batching(model.generation_config, continuous_batching_config=config)
        self._cb.warmup()  # makes the cache
        self.longest = longest_request(self._cb.batch_processor.cache)
        self._cb.start()
        self._try()

    @property
    def concurrent(self) -> int:
        """Requests that have pages at a time."""
        return self.report().requests

    def _try(self) -> None:
        """Answer a first request of one token: what the model cannot do is said now, and kernels are ready.

        Raises:
            UnsupportedModelError: it failed.
        """
        self._cb.add_request([0], max_new_tokens=2, eos_token_id=-1, do_sample=False)
        result = None
        while result is None and self._cb.is_running():
            result = self._cb.get_result(timeout=1)
        if result is None or result.error is not None:
            self.stop()
            error = result.error if result is not None else str(self._cb.background_thread_status.fatal_error)
            raise UnsupportedModelError(error.strip().splitlines()[0])

    def report(self) -> BatchingReport:
        """What the batching run holds."""
        found: BatchingReport = self._cb.report()
        return found

    def init_cb(self, model: Any, gen_config: Any) -> None:
        """Nothing is left to do."""

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: Any,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue[Any], CBStreamer]:
        """As transformers': a queue of pieces of text, and who fills it.

        Raises:
            HTTPException: the request does not fit, or has settings that cannot be.
            CBWorkerDeadError: the run has ended with an error.
        """
        queue: asyncio.Queue[Any] = asyncio.Queue()
        streamer = self._begin(processor, inputs, gen_config, request_id, queue.put_nowait, response_parser)
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, list[int]]:
        """As transformers': text, tokens of the prompt, and the new tokens.

        Raises:
            HTTPException, CBWorkerDeadError: see :meth:`generate_streaming`.
            RuntimeError: the request failed while it was computed.
        """
        pieces: list[Any] = []
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def take(item: Any) -> None:
            if item is not None:
                pieces.append(item)
            elif not over.done():
                over.set_result(None)

        streamer = self._begin(processor, inputs, gen_config, request_id, take)
        await over
        failures = [item.msg for item in pieces if isinstance(item, _StreamError)]
        if failures:
            self._check_alive(request_id)
            raise RuntimeError(failures[0])
        text = "".join(pieces) if streamer.stopped else processor.decode(streamer.ids, skip_special_tokens=True)
        return text, len(inputs["input_ids"]), streamer.ids

    def _begin(
        self,
        processor: Any,
        inputs: Any,
        gen_config: Any,
        request_id: str,
        sink: Callable[[Any], None],
        parser: Any = None,
    ) -> "_Streamer":
        """Put a request into the queue of the manager."""
        self._check_alive(request_id)
        self._forget()
        ids = list(inputs["input_ids"])
        fit(len(ids), gen_config, self.longest)
        stops, gen_config.stop_strings = gen_config.stop_strings or (), None
        tokenizer = getattr(processor, "tokenizer", processor)._tokenizer
        entry = self._ledger.live[request_id]
        entry.prompt_tokens = len(ids)
        streamer = _Streamer(self, request_id, tokenizer, sink, stops, parser)

        def taken(output: Any) -> None:
            streamer.put(output)
            entry.grown(len(output.generated_tokens))
            if output.error is not None:
                entry.outcome = "failed"
                sink(_StreamError(output.error.replace('"', "'")))
                streamer.end()
            elif output.is_finished() or streamer.stopped:
                entry.outcome = "finished"
                streamer.end()
                if not output.is_finished():
                    self.cancel(request_id)

        self._cb.register_result_handler(request_id, taken)
        try:
            self._cb.add_request(
                ids,
                request_id=request_id,
                streaming=True,
                generation_config=gen_config,
                seed=getattr(gen_config, "_seed", None),
            )
        except KVQuantError as error:
            self._drop_handler(request_id)
            self._check_alive(request_id)
            raise HTTPException(400, str(error)) from error
        return streamer

    def release(self, request_id: str) -> None:
        """A request's connection is over: if its answer is not, it ends here, and its pages are free."""
        if not self._ledger.live[request_id].outcome:
            self.cancel(request_id)

    def cancel(self, request_id: str) -> None:
        """End a request, of which nothing more is heard."""
        if self._cb.output_router.result_handlers.get(request_id) is None:
            return  # it never came to the manager, or is over
        self._cb.register_result_handler(request_id, lambda output: None)
        self._cb.cancel_request(request_id)
        self._ended.add(request_id)

    def _forget(self) -> None:
        """Drop the handlers of cancelled requests that the scheduler no longer knows."""
        if self._cb.cancel_queue.empty() and self._cb.input_queue.empty():
            scheduler = self._cb.batch_processor.scheduler
            for request_id in list(self._ended):
                if request_id not in scheduler.active_requests and request_id not in scheduler.waiting_requests:
                    self._drop_handler(request_id)
                    self._ended.discard(request_id)

    def _drop_handler(self, request_id: str) -> None:
        with self._cb.output_router._lock:
            self._cb.output_router.result_handlers.pop(request_id, None)

    def _check_alive(self, request_id: str) -> None:
        """As transformers'; and a manager that has been stopped takes no requests.

        Raises:
            CBWorkerDeadError: the run is over.
        """
        super()._check_alive(request_id)
        if self._cb is None or self._cb.background_thread_status.can_accept_new_requests() is not None:
            raise CBWorkerDeadError("the server is stopping; ask again when it has started.")

    def stop(self) -> None:
        """End the run; requests that are not over fail."""
        if self._cb.is_running():
            self._cb.stop(block=True, timeout=5, hard_stop=True)


class _Streamer(CBStreamer):
    """transformers' streamer, which decodes token by token, with stop strings and the tokens themselves.

    Args:
        engine: whose request it is.
        request_id: its name.
        tokenizer: of the Rust library.
        sink: gets the text.
        stops: strings before which it ends.
        parser: of the model's own structure, or None.
    """

    def __init__(
        self,
        engine: BatchedEngine,
        request_id: str,
        tokenizer: Any,
        sink: Callable[[Any], None],
        stops: str | Sequence[str],
        parser: Any,
    ) -> None:
        self._filter = StopFilter(sink, [stops] if isinstance(stops, str) else stops)
        self._engine = engine
        self.ids: list[int] = []
        loop = asyncio.get_running_loop()
        super().__init__(engine._cb, request_id, tokenizer, loop, self._filter, response_parser=parser)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._filter.stopped

    def put(self, output: Any) -> None:
        """Take what has come."""
        super().put(output)
        self.ids = output.generated_tokens

    def cancel(self) -> None:
        """The client has gone."""
        self._engine.cancel(self._request_id)
