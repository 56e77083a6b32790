"""A page to chat in, and beside it what the server's KV cache holds."""

import html
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Before gradio is imported, which reports its use otherwise.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
import openai
from fastapi import FastAPI

from ..errors import NoServerError
from ..reports.report import format_size
from .server import Server

_EVERY = 0.3  # seconds between two looks at the server while an answer grows
_IDLE = 3.0  # and while none does
_CSS = """
main.app { max-width: 1240px !important; margin: 0 auto !important; }
#chat { height: calc(100vh - 200px) !important; min-height: 320px; }
.kv h3 { margin: 0 0 6px; font-size: 12px; font-weight: 600; letter-spacing: .06em; text-transform: uppercase;
         color: var(--body-text-color-subdued); }
.kv dl { display: grid; grid-template-columns: 1fr auto; gap: 7px 12px; margin: 0 0 20px; font-size: 14px; }
.kv dt { opacity: .75; white-space: nowrap; }
.kv dd { margin: 0; text-align: right; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; font-weight: 600; }
.kv .bar { height: 8px; border-radius: 4px; background: var(--border-color-primary); overflow: hidden;
           margin: -8px 0 20px; }
.kv .bar div { height: 100%; background: var(--color-accent); }
"""


@dataclass
class Answer:
    """What is known of an answer while it grows, and afterwards.

    Args:
        tokens: how many it has.
        seconds: from its first token to its last.
        held: bytes that the cache held for all requests when it was last looked at during the answer.
        dense: bytes of the same tokens in the model's dtype.
    """

    tokens: int = 0
    seconds: float = 0.0
    held: int = 0
    dense: int = 0

    def note(self, report: dict[str, Any]) -> None:
        """Take over what the server holds; nothing, when the answer's request has left it already."""
        if report["bytes_held"]:
            self.held, self.dense = report["bytes_held"], report["dense_bytes"]

    @property
    def speed(self) -> float | None:
        """Tokens per second after the first; None: too few to tell."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 and self.seconds > 0 else None


def application(server: Server, settings: dict[str, Any], system: str | None = None) -> Any:
    """The page as an ASGI application; whatever it is asked, it loads nothing from other machines.

    Args:
        server: what answers.
        settings: of each request: ``max_tokens``, ``temperature``.
        system: the system prompt, or None.
    """
    client = openai.OpenAI(base_url=server.api, api_key=server.api_key or "none", max_retries=0)

    def respond(message: str, history: list[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": turn["role"], "content": _text(turn["content"])} for turn in history]
        messages.append({"role": "user", "content": message})
        yield from _answer(server, client, messages, settings)

    with gr.Blocks(title="kvquant", analytics_enabled=False, fill_width=True) as page:
        this = gr.HTML(_answer_panel(Answer()), render=False, elem_classes="kv", elem_id="answer")
        all_ = gr.HTML(_server_panel(server), render=False, elem_classes="kv", elem_id="server")
        gr.Markdown("# kvquant")
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=420):
                chatbot = gr.Chatbot(elem_id="chat", show_label=False, buttons=["copy"], placeholder="Ask something.")
                gr.ChatInterface(
                    respond,
                    chatbot=chatbot,
                    textbox=gr.Textbox(
                        placeholder="Message", show_label=False, elem_id="message", submit_btn=True, stop_btn=True
                    ),
                    additional_outputs=[this, all_],
                    api_visibility="private",
                    analytics_enabled=False,
                )
            with gr.Column(scale=2, min_width=280):
                all_.render()
                this.render()
        gr.Timer(_IDLE).tick(
            lambda: _server_panel(server), outputs=all_, show_progress="hidden", api_visibility="private"
        )
    page.queue(default_concurrency_limit=None)
    mounted = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        page,
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=_CSS,
    )
    return _Closed(mounted)


def _answer(
    server: Server, client: openai.OpenAI, messages: list[dict[str, Any]], settings: dict[str, Any]
) -> Iterator[tuple[str, str, str]]:
    """The text so far, and both panels, as an answer grows."""
    answer, text = Answer(), ""
    begun = looked = 0.0
    panel = _server_panel(server)
    try:
        options: dict[str, Any] = {"stream_options": {"include_usage": True}, **settings}
        create: Any = client.chat.completions.create
        with create(model=server.model, messages=messages, stream=True, **options) as chunks:
            for chunk in chunks:
                now = time.monotonic()
                if chunk.choices and (piece := chunk.choices[0].delta.content):
                    begun = begun or now
                    text += piece
                    answer.tokens += 1
                    answer.seconds = now - begun
                if chunk.usage is not None:
                    answer.tokens = chunk.usage.completion_tokens
                if now - looked > _EVERY:
                    report, looked = server.report(), now
                    answer.note(report)
                    panel = _server_panel(server, report)
                yield text, _answer_panel(answer), panel
    except openai.APIError as error:
        raise gr.Error(f"The server refused: {error}", print_exception=False) from error
    except NoServerError as error:
        raise gr.Error(str(error), print_exception=False) from error
    yield text, _answer_panel(answer), _server_panel(server)


def _text(content: Any) -> str:
    """What was said in a turn; gradio keeps it in parts."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part.get("type") == "text")


def _rows(title: str, rows: dict[str, tuple[str, str]]) -> str:
    """A list of names and numbers; each number has the id that its row is called by."""
    cells = "".join(
        f'<dt>{html.escape(label)}</dt><dd id="{name}">{html.escape(value)}</dd>'
        for name, (label, value) in rows.items()
    )
    return f"<h3>{title}</h3><dl>{cells}</dl>"


def _answer_panel(answer: Answer) -> str:
    """The panel of one answer."""
    speed = "–" if answer.speed is None else f"{answer.speed:,.1f}"
    rows = {"answer-tokens": ("tokens", f"{answer.tokens:,}"), "answer-speed": ("tokens/s", speed)}
    held, dense = answer.held, answer.dense
    rows |= {
        "answer-held": ("KV cache", format_size(held) if held else "–"),
        "answer-dense": ("unquantized", format_size(dense) if held else "–"),
        "answer-saved": ("saved", format_size(dense - held) if held else "–"),
        "answer-ratio": ("ratio", f"{dense / held:.2f}" if held else "–"),
    }
    share = f'<div class="bar"><div style="width: {min(100.0, 100 * held / dense):.1f}%"></div></div>' if held else ""
    return _rows("This answer", rows) + share


def _server_panel(server: Server, report: dict[str, Any] | None = None) -> str:
    """The panel of the server, as it is now unless a report is given."""
    try:
        report = server.report() if report is None else report
    except NoServerError as error:
        return f"<h3>Server</h3><p>{html.escape(str(error))}</p>"
    held, dense = report["bytes_held"], report["dense_bytes"]
    rows = {
        "model": ("model", report["model"]),
        "policy": ("policy", report["policy"]),
        "requests": ("requests now", f"{report['requests']['running']:,}"),
        "tokens": ("generated", f"{report['tokens']['generated']:,}"),
        "held": ("KV cache now", format_size(held)),
        "saved": ("saved now", format_size(report["bytes_saved"])),
        "ratio": ("ratio now", f"{dense / held:.2f}" if held else "–"),
    }
    return _rows("Server", rows)


class _Closed:
    """An ASGI application whose pages may load nothing from elsewhere: browsers refuse what gradio's own would.

    Args:
        app: the application.
    """

    _POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, with the header in front."""

        async def send_closed(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", self._POLICY)]
            await send(message)

        await self._app(scope, receive, send_closed)
