"""The models that a server answers for: the one it was started with, and others only where that is allowed."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import HTTPException
from transformers.cli.serving.model_manager import ModelManager


class ServedModels(ModelManager):
    """transformers' manager of models, with one model that is there from the beginning and stays.

    Args:
        name: what requests call it.
        model: the model.
        processor: its tokenizer or processor.
        others: whether a request may name another model, which is then loaded, and generates in turn.
        ended: called when the server ends.
    """

    def __init__(
        self, name: str, model: Any, processor: Any, others: bool, ended: Callable[[], object] = lambda: None
    ) -> None:
        super().__init__()
        self._ended = ended
        self.name, self.model, self.processor = name, model, processor
        self.others = others
        self._since = int(time.time())

    def is_ours(self, name: str | None) -> bool:
        """Whether a request that says ``name`` means the model of this server."""
        return name in (None, self.name, f"{self.name}@main")

    def check_name(self, name: str | None) -> None:
        """Refuse other models where they are not allowed.

        Raises:
            HTTPException: 404.
        """
        if not self.is_ours(name) and not self.others:
            raise HTTPException(
                404, f"there is no model {name!r} here; this server has {self.name!r} (GET /v1/models lists it)."
            )

    def load_model_and_processor(
        self,
        model_id_and_revision: str,
        progress_callback: Callable[..., Any] | None = None,
        tqdm_class: type | None = None,
        gguf_file: str | None = None,
    ) -> tuple[Any, Any]:
        """As transformers'.

        Raises:
            HTTPException: 404: another model, which is not allowed or cannot be loaded.
        """
        if gguf_file is None and self.is_ours(model_id_and_revision):
            return self.model, self.processor
        self.check_name(model_id_and_revision if gguf_file is None else f"{model_id_and_revision}:{gguf_file}")
        try:
            model, processor = super().load_model_and_processor(
                model_id_and_revision, progress_callback, tqdm_class, gguf_file
            )
        except (OSError, ValueError) as error:
            first = (str(error).strip().splitlines() or ["no message"])[0]
            raise HTTPException(404, f"model {model_id_and_revision!r} cannot be loaded: {first}") from error
        return model, processor

    async def load_model_streaming(
        self, model_id_and_revision: str, gguf_file: str | None = None
    ) -> AsyncIterator[str]:
        """As transformers': what a chat client waits for before it begins."""
        if gguf_file is None and self.is_ours(model_id_and_revision):
            yield _event(status="ready", model=self.name, cached=True)
            return
        try:
            await asyncio.to_thread(self.load_model_and_processor, model_id_and_revision, gguf_file=gguf_file)
        except HTTPException as error:
            yield _event(status="error", model=model_id_and_revision, message=error.detail)
        else:
            yield _event(status="ready", model=model_id_and_revision, cached=False)

    def list_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """The model of this server, then others that requests have loaded."""
        names = [self.name, *(name.removesuffix("@main") for name in self.loaded_models)]
        return [
            {
                "id": name,
                "object": "model",
                "created": self._since,
                "owned_by": "kvquant-hf",
                "status": {"value": "loaded"},
            }
            for name in names
        ]

    def shutdown(self) -> None:
        """As transformers'; the engine ends too."""
        super().shutdown()
        self._ended()

    get_gen_models = list_models  # transformers 5.23


def _event(**what: Any) -> str:
    return f"data: {json.dumps(what)}\n\n"
