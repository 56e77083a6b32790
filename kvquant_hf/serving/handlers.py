"""transformers' handlers of requests, which here answer for one model, and hear every setting."""

import json
from typing import Any

from fastapi import HTTPException
from jinja2 import TemplateError
from pydantic import BaseModel
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import BaseHandler

from . import requests
from .models import ServedModels

_LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


class _Handler(BaseHandler):
    """What is added to each of transformers' handlers.

    Args:
        default_tokens: new tokens of a request that does not say how many.
        kwargs: as there.
    """

    form: type[BaseModel]
    model_manager: ServedModels

    def __init__(self, default_tokens: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._default_tokens = default_tokens

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """As transformers'.

        Raises:
            HTTPException: 400: something about the request is wrong; 404: it names another model.
        """
        requests.check(body, self.form)
        if self.model_manager.is_ours(body.get("model")):
            requests.check_text(body)
            requests.check_template(body, self.model_manager.processor)
        body.setdefault("stream", False)  # transformers' responses are streamed by default, OpenAI's are not
        try:
            return await super().handle_request(body, request_id)
        except TemplateError as error:
            raise HTTPException(400, f"the model's chat template refuses the messages: {error}") from error

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request({name: x for name, x in body.items() if name not in requests.OWN_FIELDS})

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        served = self.model_manager
        if served.is_ours(body.get("model")):
            return served.name, served.model, served.processor
        served.check_name(body["model"])
        return super()._resolve_model(body)

    def _build_generation_config(self, body: dict[str, Any], model_generation_config: Any, use_cb: bool = False) -> Any:
        """As transformers', which takes a temperature for a model that is greedy by default and does not draw, and
        seeds the numbers of all requests with the seed of one."""
        try:
            config = super()._build_generation_config(
                {name: x for name, x in body.items() if name != "seed"}, model_generation_config, use_cb=False
            )
        except (json.JSONDecodeError, TypeError, ValueError) as error:
            raise HTTPException(400, f"generation_config: {error}") from error
        config._new_tokens_given = any(body.get(name) is not None for name in _LENGTHS) or (
            body.get("generation_config") is not None and config.max_new_tokens is not None
        )
        if not config._new_tokens_given:
            config.max_new_tokens = self._default_tokens
        config.cache_implementation = config.cache_config = None  # the server brings its own
        for name in ("top_k", "min_p", "repetition_penalty"):
            if body.get(name) is not None:
                setattr(config, name, body[name])
        if body.get("logit_bias") is not None:
            config.sequence_bias = {(int(token),): float(bias) for token, bias in body["logit_bias"].items()}
        if body.get("temperature") is not None:
            config.do_sample = body["temperature"] > 0
        elif body.get("top_p") is not None or body.get("top_k") is not None:
            config.do_sample = True
        if not config.do_sample:  # what greedy requests do not use, and transformers warns of
            config.temperature = config.top_p = config.top_k = config.min_p = None
        if body.get("ignore_eos"):
            config.eos_token_id = -1
        elif config.eos_token_id is None:
            config.eos_token_id = model_generation_config.eos_token_id
        config._seed = body.get("seed")
        return config


class Chats(_Handler, ChatCompletionHandler):
    """``/v1/chat/completions``"""

    form = requests.Chat


class Completions(_Handler, CompletionHandler):
    """``/v1/completions``"""

    form = requests.Completion


class Responses(_Handler, ResponseHandler):
    """``/v1/responses``"""

    form = requests.Response
