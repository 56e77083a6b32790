"""``QuantizedBatchingManager``: what ``init_continuous_batching`` returns for quantized pages."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager

from ..errors import BatchingError, KVQuantError, UnsupportedModelError
from ..transformers_api.heads import check_shards
from .calls import ATTENTION, REFUSED
from .config import QuantizedBatchingConfig
from .model import check_layers, check_model
from .report import BatchingReport, count_blocks, report_of
from .sampling import RequestProcessors, RequestRunner, carried, check_range
from .settings import Sampling, check_config, settings_of


class QuantizedBatchingManager(ContinuousBatchingManager):
    """transformers' manager, whose blocks are quantized pages: queue, streams and results are all its own.

    Requests may have settings of their own (:meth:`add_request`); ``generation_config`` is what they leave open.

    Args:
        model: the model.
        generation_config: as there.
        continuous_batching_config: ours.
        workload_hints: as there.

    Raises:
        BatchingError: ``generation_config`` asks for what requests of a batch cannot have.
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
        check_config(generation_config)
        self._last: BatchingReport | None = None
        self._most_used = 0
        self._added = 0
        self._refused: list[KVQuantError] | None = None  # of the last call of generate_batch
        self._fatal: KVQuantError | None = None  # what ended the run, before transformers' thread has it in its status
        with self._or_as_before(model):
            # What transformers would make of the settings of sampling holds for all requests; ours hold for each.
            bare = GenerationConfig(do_sample=False, eos_token_id=generation_config.eos_token_id)
            bare.num_return_sequences = generation_config.num_return_sequences
            super().__init__(model, bare, continuous_batching_config, workload_hints)
        self.generation_config = generation_config
        self.logit_processor = RequestProcessors()

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
            processor = super()._create_batch_processor()
        if not isinstance(processor.model_runner, RequestRunner):  # it is kept from an earlier session
            processor.model_runner = RequestRunner(
                self.model,
                Sampling(self.generation_config, "", 0),
                logit_processor=self.logit_processor,
                cb_config=self.continuous_batching_config,
                cache=processor.cache,
                inputs_and_outputs=processor.inputs_and_outputs,
                return_logprobs=processor.return_logprobs,
            )
        return processor

    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | list[int] | None = None,
        *,
        generation_config: Any = None,
        seed: int | None = None,
        **settings: Any,
    ) -> str | None:
        """As transformers', with settings of the request's own.  A request that could never be held is refused here,
        because once it is let in, it ends the run of all others.

        Args:
            input_ids: the prompt.
            request_id: as there.
            max_new_tokens: as there.
            streaming: as there.
            record_timestamps: as there.
            eos_token_id: as there.
            generation_config: of this request; what is None in it is as in the manager's.
            seed: of this request, whose answer then does not depend on what else runs; None: drawn from torch's
                generator, or from the seed of the batching config.
            settings: single settings by name: ``temperature=0.7, do_sample=True``.

        Raises:
            BatchingError: the prompt and its new tokens need more blocks than there are, or a setting is out of range,
                unknown, or none that requests of a batch can have; or an error has ended the run.
            KVQuantError: what has ended the run, if it was an error of ours.
        """
        self._added += 1
        self._refused = REFUSED.get()
        if seed is None:
            base = getattr(self.continuous_batching_config, "seed", None)
            seed = int(torch.randint(2**62, ())) if base is None else base + self._added
        if eos_token_id is not None:
            settings["eos_token_id"] = eos_token_id
        try:
            sampling = settings_of(self.generation_config, generation_config, seed, settings)
            check_range(self.model, sampling, list(input_ids))
            new = sampling.config.max_new_tokens if max_new_tokens is None else max_new_tokens
            if self.batch_processor is not None:
                self.batch_processor.cache.check_fits(len(input_ids), new or 0)
        except BatchingError as error:
            self._note(error)
            raise
        ends = sampling.config.eos_token_id
        added: str | None = super().add_request(
            input_ids, request_id, new, streaming, record_timestamps, ends, **carried(sampling)
        )
        if self._fatal is not None:
            if added is None:
                self._note(self._fatal)
                raise self._fatal
            self._fail_all_remaining_requests(self._fatal, None)  # the thread may have looked for the last time before
        return added

    def _note(self, error: KVQuantError) -> None:
        """Let the call of ``generate_batch`` that waits know of an error."""
        if self._refused is not None:
            self._refused.append(error)

    def _handle_critical_error(self, error: Exception, batch_processor: Any) -> None:
        """As transformers', which ends all requests with it; what is not ours is told as a ``BatchingError``."""
        if isinstance(error, KVQuantError):
            self._fatal = error
        else:
            self._fatal = BatchingError(
                f"the run has ended with an error ({error}); stop the manager and start it again."
            )
            self._fatal.__cause__ = error
        self._note(self._fatal)
        super()._handle_critical_error(error, batch_processor)

    def _generation_step(self) -> None:
        """As transformers', except where a step has no tokens: a prompt of which all is held but the token that its
        forks begin with is in one, and the model would be called with nothing."""
        if self.batch_processor.inputs_and_outputs.total_seqlen_q:
            super()._generation_step()
        self._most_used = max(self._most_used, count_blocks(self.batch_processor.cache)[0])

    def _generation_loop_body(self, batch_processor: Any, bootstrapping: bool) -> bool:
        """As transformers'; a request whose settings failed in the step ends with the error, and no other does."""
        goes_on: bool = super()._generation_loop_body(batch_processor, bootstrapping)
        failed = batch_processor.model_runner.failed
        while failed:
            request_id, error = failed.popitem()
            state = batch_processor.scheduler.active_requests.get(request_id)
            if state is not None:  # else it was its last token
                self.output_router.fail_and_deliver(state, error)
                batch_processor.scheduler.set_request_cancellation(request_id)
        return goes_on

    def start(self) -> None:
        """As transformers'; a manager that was stopped, which gave the model its own attention back, takes it again."""
        self.switch_to_cb_friendly_attn(self.model)
        if not self.is_running():
            self._fatal = None
        super().start()

    def stop(self, *args: Any, **kwargs: Any) -> None:
        """As transformers'; the report of the run is kept."""
        processor = self.batch_processor
        super().stop(*args, **kwargs)
        if processor is not None:
            self._last = report_of(processor.cache, self._most_used)

    def report(self) -> BatchingReport:
        """What the run holds and what ran in it; after it has ended, what it was then.

        Raises:
            BatchingError: it has not begun.
        """
        if self.batch_processor is not None:
            return report_of(self.batch_processor.cache, self._most_used)
        if self._last is None:
            raise BatchingError("there is nothing to report before the manager has started; call start() first.")
        return self._last
