"""The application: transformers' own, with our engine, our models, and what it says of itself."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException  # fastapi's is one, and so is that of a path that nobody has
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import CBWorkerDeadError, GenerationState

from ..reports.report import format_size
from ..transformers_api.auto import policy_for
from .batched import BatchedEngine
from .gate import Gate, error_body
from .handlers import Chats, Completions, Responses
from .ledger import Ledger
from .metrics import Engine, Metrics, overview
from .models import ServedModels
from .options import ServeOptions
from .sequential import SequentialEngine

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# What transformers' application has and this server has not: other kinds of models, and a way to unload this one.
_DROPPED = ("/v1/audio/transcriptions", "/v1/systemone", "/reset")


class Application(Gate):
    """A server without its socket: an ASGI application.

    Args:
        name: what requests call the model.
        model: a model in eval mode.
        processor: its tokenizer or processor.
        options: what is asked for.

    Attributes:
        name: of the model.
        engine: what computes.
        options: what was asked for.
        replica: which of several servers behind one address this is; empty if there is one.

    Raises:
        UnsupportedVersionError: transformers is too old or too new.
        UnsupportedModelError: the model cannot be batched, or its cache cannot be quantized.
        OutOfPages: the budget has no room.
        UnknownPolicyError, QParamsError: an option of the cache is unknown.
    """

    def __init__(self, name: str, model: Any, processor: Any, options: ServeOptions) -> None:
        self.name, self.options, self.replica = name, options, ""
        self._policy = policy_for(model.config, options.policy, options.page_size)
        metrics = Metrics()
        ledger = Ledger(metrics.closed, metrics.refused)
        in_turn = SequentialEngine(options, ledger)
        in_turn.check(model)
        self.engine: Engine = BatchedEngine(model, options, ledger) if options.continuous_batching else in_turn
        ledger.room = self.engine.concurrent + options.queue
        metrics.watch(ledger, self.engine)
        models = ServedModels(name, model, processor, options.allow_any_model, self.engine.stop)
        app = _transformers_application(models, _Generation(name, self.engine, in_turn), options)
        _answer_errors(app)
        self._add_routes(app, metrics)

        def release(request_id: str) -> None:
            for engine in {self.engine, in_turn}:
                engine.release(request_id)

        super().__init__(app, ledger, release, options.api_key)

    def room(self) -> str:
        """What requests find room for, in one line."""
        engine = self.engine
        if not isinstance(engine, BatchedEngine):
            return "one request at a time"
        found = engine.report()
        return (
            f"room for {found.requests} requests at a time and {found.blocks} blocks of {found.page_size} tokens in "
            f"{format_size(found.bytes)}; a request has at most {engine.longest:,} tokens"
        )

    def report(self) -> dict[str, Any]:
        """What ``/kvquant/report`` says; see ``metrics.overview``."""
        which = {"replica": self.replica} if self.replica else {}
        return which | {"model": self.name, "policy": self._policy.name} | overview(self.ledger, self.engine)

    def _add_routes(self, app: FastAPI, metrics: Metrics) -> None:
        @app.get("/kvquant/report")
        async def report() -> dict[str, Any]:
            return self.report()

        @app.get("/metrics")
        async def prometheus() -> Response:
            return Response(metrics.text(), media_type=_METRICS_TYPE)


class _Generation(GenerationState):
    """Which engine a request goes to: the server's, or the one in turn for models that requests bring."""

    def __init__(self, name: str, engine: Engine, in_turn: SequentialEngine) -> None:
        super().__init__()
        self._name, self._engine, self._in_turn = name, engine, in_turn

    def use_continuous_batching(self, model: Any, modality: Any) -> bool:
        return isinstance(self._engine, BatchedEngine) and self._engine.model is model

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        return self._engine if model_id == self._name else self._in_turn

    def is_cb_alive(self) -> bool:
        return self._engine.is_alive()


def _transformers_application(models: ServedModels, generation: _Generation, options: ServeOptions) -> FastAPI:
    """transformers' application with our parts."""
    parts: dict[str, Any] = {
        "default_tokens": options.max_tokens,
        "model_manager": models,
        "generation_state": generation,
    }
    app: FastAPI = build_server(
        models,
        Chats(**parts),
        completion_handler=Completions(**parts),
        response_handler=Responses(**parts),
        transcription_handler=None,
        systemone_handler=None,
        generation_state=generation,
        enable_cors=options.cors,
    )
    app.title = "kvquant"
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) not in _DROPPED]
    return app


def _answer_errors(app: FastAPI) -> None:
    """Say errors as OpenAI's servers do."""

    def answers(status: Callable[[Any], int], text: Callable[[Any], str]) -> Callable[..., Any]:
        async def answer(request: Request, error: Any) -> JSONResponse:
            return JSONResponse(error_body(status(error), text(error)), status(error))

        return answer

    def first_fault(error: RequestValidationError) -> str:
        fault = error.errors()[0]
        return f"the request is no JSON object: {fault['msg']}"

    app.add_exception_handler(
        HTTPException,
        # Fields that nobody knows are 422 to transformers and 400 to OpenAI's clients.
        answers(lambda error: 400 if error.status_code == 422 else error.status_code, lambda error: str(error.detail)),
    )
    app.add_exception_handler(RequestValidationError, answers(lambda error: 400, first_fault))
    app.add_exception_handler(CBWorkerDeadError, answers(lambda error: 503, str))
    app.add_exception_handler(Exception, answers(lambda error: 500, lambda error: f"{type(error).__name__}: {error}"))
