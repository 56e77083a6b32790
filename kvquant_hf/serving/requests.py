"""What a request may say.  transformers' handlers ignore what they do not know how to do; here it is refused."""

import inspect
from typing import Annotated, Any, Literal

from fastapi import HTTPException
from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError

_Whole = Annotated[int, Strict(), Field(ge=1)]
_Off = Literal[False, 0] | None
_Stop = Annotated[str, Field(min_length=1)]

_TEXT_PARTS = ("text", "input_text", "output_text")

# Beyond OpenAI's fields: settings of transformers' generation that other servers take under these names too.
OWN_FIELDS = ("top_k", "min_p", "repetition_penalty", "ignore_eos")


class _Settings(BaseModel):
    """What all requests have; fields that are not here are transformers' to judge."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    stream: Annotated[bool, Strict()] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Strict()] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] | None = None
    frequency_penalty: Annotated[float, Field(gt=-1, le=2)] | None = None
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d+$")], Annotated[float, Field(ge=-100, le=100)]] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    ignore_eos: bool | None = None
    # What OpenAI's servers do and this one does not.
    n: Literal[1] | None = None
    presence_penalty: Literal[0] | None = None
    logprobs: _Off = None
    top_logprobs: Literal[0] | None = None


class _Message(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: Annotated[str, Field(min_length=1)]
    content: str | list[dict[str, Any]] | None = None


class _Tool(BaseModel):
    """A function, described in the tool itself (responses) or in a field of it (chats)."""

    model_config = ConfigDict(extra="allow")

    type: Literal["function"]
    function: dict[str, Any] | None = None


class _TextFormat(BaseModel):
    type: Literal["text"]


class Chat(_Settings):
    """``/v1/chat/completions``"""

    messages: Annotated[list[_Message], Field(min_length=1)]
    max_tokens: _Whole | None = None
    max_completion_tokens: _Whole | None = None
    response_format: _TextFormat | None = None
    tools: list[_Tool] | None = None
    tool_choice: Literal["auto", "none"] | None = None


class Completion(_Settings):
    """``/v1/completions``"""

    prompt: Annotated[str, Field(min_length=1)]
    max_tokens: _Whole | None = None
    suffix: str | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None


class Response(_Settings):
    """``/v1/responses``"""

    input: Annotated[str, Field(min_length=1)] | Annotated[list[dict[str, Any]], Field(min_length=1)] | dict[str, Any]
    instructions: str | None = None
    tools: list[_Tool] | None = None
    max_output_tokens: _Whole | None = None
    previous_response_id: None = None
    background: Literal[False] | None = None


def check_text(body: dict[str, Any]) -> None:
    """Refuse parts of messages that are no text, which transformers would drop for a model of text.

    Raises:
        HTTPException: 400.
    """
    messages = body.get("messages") or body.get("input")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in _TEXT_PARTS:
                raise HTTPException(400, f"messages: this model reads text, and a part is of type {kind!r}.")


def check_template(body: dict[str, Any], tokenizer: Any) -> None:
    """Refuse arguments of a chat template that are the server's to give, another template among them.

    Raises:
        HTTPException: 400.
    """
    given = body.get("chat_template_kwargs") or {}
    if not isinstance(given, dict):
        raise HTTPException(400, "chat_template_kwargs: input should be a dictionary.")
    taken = given.keys() & inspect.signature(tokenizer.apply_chat_template).parameters.keys()
    if taken:
        raise HTTPException(400, f"chat_template_kwargs: {', '.join(sorted(taken))} cannot be given by a request.")


def check(body: dict[str, Any], form: type[BaseModel]) -> None:
    """Refuse a body that is not of its form.

    Raises:
        HTTPException: 400: the first thing that is wrong, and where.
    """
    try:
        form.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(
            str(part) for part in first["loc"] if not str(part).startswith(("constrained", "list[", "str"))
        )
        raise HTTPException(400, f"{where or 'the request'}: {first['msg'][0].lower()}{first['msg'][1:]}.") from error
