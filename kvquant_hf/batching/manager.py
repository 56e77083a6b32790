"""``QuantizedBatchingManager``: what ``init_continuous_batching`` returns for quantized pages."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.generation.continuous_batching import ContinuousBatchingManager

from ..errors import BatchingError, UnsupportedModelError
from ..transformers_api.heads import check_shards
from .calls import ATTENTION, REFUSED
from .config import QuantizedBatchingConfig
from .model import check_layers, check_model
from .report import BatchingReport, report_of


class QuantizedBatchingManager(ContinuousBatchingManager):
    """transformers' manager, whose blocks are quantized pages: queue, streams and results are all its own.

    Args:
        model: the model.
        generation_config: as there.
        continuous_batching_config: ours.
        workload_hints: as there.

    Raises:
        UnsupportedModelError: the model has an encoder, its attention cannot be replaced, or its layers are of a kind
            without blocks, or where blocks cannot be.
    """

    def __init__(
        self,
        model: Any,
        generation_config: Any,
        continuous_batching_config: QuantizedBatchingConfig,
        workload_hints: Any = None,
    ) -> None:
        check_model(model)
        check_layers(model.config.get_text_config())
        check_shards(model)
        self._last: BatchingReport | None = None
        with self._or_as_before(model):
            super().__init__(model, generation_config, continuous_batching_config, workload_hints)

    @contextmanager
    def _or_as_before(self, model: Any) -> Iterator[None]:
        """Give the model its attention function back if what is in the block fails: no one would come to ``stop``."""
        before = model.config._attn_implementation
        try:
            yield
        except BaseException:
            original = getattr(self, "_original_attn_impl", None) or before
            if model.config._attn_implementation != original:
                model.set_attn_implementation(original)
            self._original_attn_impl = None
            raise

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        """Have the model call our attention function until the manager stops."""
        before = model.config._attn_implementation
        if before == ATTENTION:
            return
        model.set_attn_implementation(ATTENTION)
        if model.config._attn_implementation != ATTENTION:
            raise UnsupportedModelError(
                f"{type(model).__name__} computes attention itself and cannot read pages of many requests; use "
                "generate() for this model."
            )
        self._original_attn_impl = before

    def _create_batch_processor(self) -> Any:
        """As transformers', which makes the cache here; the model is left as it was if that cannot be."""
        with self._or_as_before(self.model):
            return super()._create_batch_processor()

    def add_request(
        self, input_ids: list[int], request_id: str | None = None, max_new_tokens: int | None = None, **kwargs: Any
    ) -> str | None:
        """As transformers'; a request that could never be held is refused here, because once it is let in, it ends the
        run of all others.

        Raises:
            BatchingError: the prompt and its new tokens need more blocks than there are.
        """
        new = self.generation_config.max_new_tokens if max_new_tokens is None else max_new_tokens
        try:
            if self.batch_processor is not None:
                self.batch_processor.cache.check_fits(len(input_ids), new or 0)
        except BatchingError as error:
            if (refused := REFUSED.get()) is not None:
                refused.append(error)
            raise
        added: str | None = super().add_request(input_ids, request_id, max_new_tokens, **kwargs)
        return added

    def _generation_step(self) -> None:
        """As transformers', except where a step has no tokens: a prompt of which all is held but the token that its
        forks begin with is in one, and the model would be called with nothing."""
        if self.batch_processor.inputs_and_outputs.total_seqlen_q:
            super()._generation_step()

    def start(self) -> None:
        """As transformers'; a manager that was stopped, which gave the model its own attention back, takes it again."""
        self.switch_to_cb_friendly_attn(self.model)
        super().start()

    def stop(self, *args: Any, **kwargs: Any) -> None:
        """As transformers'; the report of the run is kept."""
        processor = self.batch_processor
        super().stop(*args, **kwargs)
        if processor is not None:
            self._last = report_of(processor.cache)

    def report(self) -> BatchingReport:
        """What the run holds and what ran in it; after it has ended, what it was then.

        Raises:
            BatchingError: it has not begun.
        """
        if self.batch_processor is not None:
            return report_of(self.batch_processor.cache)
        if self._last is None:
            raise BatchingError("there is nothing to report before the manager has started; call start() first.")
        return self._last
