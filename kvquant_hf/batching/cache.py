"""The cache of a batching run: what transformers' processor and the model's attention ask for, answered by pages."""

from typing import Any

import torch
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import CachePool
from transformers.generation.continuous_batching.utils import find_head_dim, find_num_key_value_heads

from ..errors import BatchingError, UnsupportedModelError
from ..pages.layout import StoreLayout, without_autocast
from ..reports.calls import CallLog
from ..transformers_api.auto import policy_for
from ..transformers_api.heads import shards_of_heads
from ..triton_kernels.ops import PagedSide, choose, paged_attention
from .allocator import allocators_of
from .config import QuantizedBatchingConfig
from .model import FULL, check_layers, layouts_of, places_of, rotary_limit
from .prompt import attend_to_itself
from .rounding import append
from .sizing import TYPICAL_TOKENS, PageMemory
from .slots import OpenPages, zeros
from .step import Group, Row, group_rows

_KEPT_SIDES = 512  # calls whose tensors are kept from step to step
_NOT_READY = "transformers' own continuous batching does not run this model; use generate() for this model."


class QuantizedBatchingCache(PagedAttentionCache):
    """Keys and values of all live requests in quantized pages.

    Args:
        config: the decoder's config.
        continuous_batching_config: ours.
        device: where the pages live.
        distributed_helper: transformers' ``DistributedHelper``: over how many processes the model is spread, and how.
        dtype: the model's dtype, in which open pages are held.
        model_supports_logits_to_keep: whether the model computes logits of the last tokens only.

    Raises:
        UnsupportedModelError: a layer that is neither full attention nor a sliding window, or a head_dim that a codec
            cannot store, or key/value heads that the processes cannot share.
        UnknownPolicyError: no policy in a budget.  WrongModelError: a policy by layer, or parameters, of another model.
        QParamsError: parameters are missing, cannot be read, or not taken.
        OutOfPages: the memory has no room for a block beside the open pages.
    """

    def __init__(
        self,
        config: Any,
        continuous_batching_config: QuantizedBatchingConfig,
        device: torch.device | str,
        distributed_helper: Any,
        dtype: torch.dtype = torch.float16,
        model_supports_logits_to_keep: bool = False,
    ) -> None:
        cb = continuous_batching_config
        check_layers(config)
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        self.policy, self.impl = policy_for(config, cb.policy, cb.page_size), cb.impl
        self.exact_prefill = cb.prefill == "exact"
        heads = find_num_key_value_heads(config)
        shards = shards_of_heads(distributed_helper.tp_plan, heads, distributed_helper.tp_size)
        like = torch.empty(1, heads // shards, 0, find_head_dim(config), dtype=dtype, device=self.device)
        self.layouts = layouts = layouts_of(config, self.policy, cb, like)
        self.places, windows = places_of(config, layouts)
        self.cache_allocators = allocators_of(self.places, windows, layouts, cb.allow_block_sharing)
        self.lanes: dict[int, int] = {}  # of each layer, over all kinds of blocks
        before = 0
        for kind, allocator in self.cache_allocators.items():
            self.lanes |= {layer: before + place.lane for layer, place in self.places.items() if place.kind == kind}
            before += allocator.lanes
        self.layer_to_allocator = {layer: self.cache_allocators[place.kind] for layer, place in self.places.items()}
        self.pages = self.cache_allocators[FULL]

        self.bytes_per_sector, self.tokens_per_sector = self.pages.bytes_per_block, cb.page_size
        dense_block = sum(x.dense_bytes_per_token() for x in layouts.values()) * cb.page_size
        typical = sum(x.most_blocks(TYPICAL_TOKENS, TYPICAL_TOKENS) for x in self.cache_allocators.values())
        sizes = PageMemory(
            OpenPages.bytes_per_slot(layouts.values()),
            typical,
            shards,
            config=config,
            cb_config=cb,
            dtype=dtype,
            bytes_per_sector=self.bytes_per_sector,
            tokens_per_sector=self.tokens_per_sector,
            bytes_per_block=dense_block,
            attn_types=list(self.cache_allocators),
            model_supports_logits_to_keep=model_supports_logits_to_keep,
        ).divide()
        if distributed_helper.tp_size > 1:  # every device does what the smallest can
            least = torch.tensor(sizes, device=self.device, dtype=torch.int64)
            distributed_helper.tp_all_reduce_min(least)
            sizes = tuple(least.tolist())
        self.max_batch_tokens, self.num_sectors, slots = sizes

        held = self.num_sectors * self.bytes_per_sector
        self.cache_tensor = zeros((held + 2 * self.bytes_per_sector,), torch.uint8, self.device)
        self.pool = CachePool(self.num_sectors, len(self.cache_allocators))
        self.open = OpenPages(layouts, slots, self.device)
        for allocator in self.cache_allocators.values():
            allocator.register_cache_tensor(self.bytes_per_sector, held, self.cache_tensor, self.pool)
            allocator.open = self.open

        self.allow_block_sharing = cb.allow_block_sharing
        self.use_prefix_sharing = all(x.use_block_sharing for x in self.cache_allocators.values())
        # What transformers writes into the config, and reads when the manager starts again: a measure of memory.
        self.num_blocks = cb.num_blocks or (held + self.open.nbytes) // dense_block
        # What bounds the index tensors of dense attention; pages have their own tables, which nothing bounds.
        self.max_blocks_per_request = self.max_decode_fast_path_length = self.read_cache_limit = 0
        self.max_tokens_read = 1

        self._first, self.log = min(layouts), CallLog()
        self._noted: Any = None  # the step that ``_rows`` belong to
        self._rows: list[tuple[str, int, int]] = []
        self._groups: list[Group] | None = None
        self._copies: tuple[list[int], list[int]] = ([], [])  # slots, from and to
        self._sides: dict[tuple[int, int, int], tuple[PagedSide, PagedSide]] = {}

    # -- who may come in -----------------------------------------------------------------------------------------------

    def check_fits(self, prompt: int, new: int) -> None:
        """Refuse a request that could not be held if it were alone.

        Raises:
            BatchingError: it has ``prompt`` tokens, may get ``new`` more, and needs more blocks than there are, or is
                longer than requests can be beside each other.
        """
        tokens = prompt + new - 1  # the last one is not stored
        limit = rotary_limit(self.config)
        if limit is not None and tokens > limit:
            raise BatchingError(
                f"a prompt of {prompt} tokens and up to {new} new ones go beyond {limit}, where this model chooses its "
                "rotary embedding by the longest request of a batch; use generate(), or shorten it."
            )
        needed = sum(x.most_blocks(tokens, self.max_batch_tokens) for x in self.cache_allocators.values())
        if needed > self.num_sectors:
            raise BatchingError(
                f"a prompt of {prompt} tokens and up to {new} new ones need {needed} blocks, there are "
                f"{self.num_sectors}; shorten it, lower max_new_tokens, or give more memory (num_blocks, max_bytes)."
            )

    def can_store_request_tokens(self, state: Any, request_len: int, dry_run: bool = False) -> bool:
        """As transformers': whether there are blocks for a request's next tokens, which it then has; and a slot."""
        for allocator in self.cache_allocators.values():
            allocator.give_back_outlived(state.request_id, state.current_len())
        if state.request_id not in self.open.of and not self.open.free:
            return False
        fits: bool = super().can_store_request_tokens(state, request_len, dry_run)
        return fits

    def search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
        """As transformers', if there is a slot: a request that shares blocks is live."""
        if request_id not in self.open.of and not self.open.free:
            return 0
        found: int = super().search_prefix_match(request_id, prompt_ids)
        return found

    def count_new_complete_blocks(self, state: Any, request_len: int) -> dict[str, int]:
        """Blocks that the next tokens of a request seal: only those may be shared."""
        if not self.use_prefix_sharing or not request_len:
            return {}
        past = state.current_len()
        new = (past + request_len - 1) // self.pages.tokens_per_page - self.pages.sealed(state.request_id, past)
        return {FULL: new} if new else {}

    def prepare_fork_request(self, src_state: Any, dst_req_ids: list[str], copy_src_and_dst: Any) -> list[str]:
        """As transformers', for as many forks as there are slots."""
        forked: list[str] = super().prepare_fork_request(src_state, dst_req_ids[: self.open.free], copy_src_and_dst)
        for request_id in forked:
            self._copies[0].append(self.open.of[src_state.request_id])
            self._copies[1].append(self.open.of[request_id])
        return forked

    def perform_cache_copy(self, copy_src_and_dst: Any) -> None:
        """As transformers'; a fork's open page is a copy."""
        if self._copies[0]:
            self.open.copy(*self._copies)
            self._copies = ([], [])
        super().perform_cache_copy(copy_src_and_dst)

    # -- a step --------------------------------------------------------------------------------------------------------

    def extend_read_and_write_indices(
        self, request_id: str, past_length: int, query_length: int, read_index: Any, write_index: Any
    ) -> None:
        """Note a request of the step being prepared; a list of its own for each step says which one."""
        if write_index is not self._noted:
            self._noted, self._rows, self._groups = write_index, [], None
        self._rows.append((request_id, past_length, query_length))

    def _plan(self) -> list[Group]:
        """The calls of the step that was noted."""
        rows, start = [], 0
        for request_id, past, new in self._rows:
            blocks = [table for x in self.cache_allocators.values() for table in x.tables(request_id)]
            sealed = self.pages.sealed(request_id, past)
            rows.append(Row(self.open.of[request_id], start, new, past, sealed, blocks))
            start += new
        return group_rows(rows, self.pages.tokens_per_page, self.exact_prefill, self.device)

    def _sides_of(self, layer_idx: int, group: Group) -> tuple[PagedSide, PagedSide]:
        """Keys and values of a layer for a group: the same objects as in the step before, if its slots are."""
        key = layer_idx, group.slots.start, group.slots.stop
        if key not in self._sides:
            if len(self._sides) >= _KEPT_SIDES * len(self.layouts):
                self._sides.clear()
            keys, values = self.open.tails[layer_idx]
            tails = keys[group.slots], values[group.slots]
            planes = self.pages.planes[self.places[layer_idx].position]
            self._sides[key] = self.layouts[layer_idx].sides(planes, tails)
        return self._sides[key]

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        """There is no one length.

        Raises:
            UnsupportedModelError: always: a model that asks is none that transformers' continuous batching runs.
        """
        raise UnsupportedModelError(_NOT_READY)

    @torch.compiler.disable
    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new tokens of a step; they are returned as they came, for prompts that attend to them.

        Args:
            key_states: ``[1, heads, tokens, head_dim]``.
            value_states: the same for values.
            layer_idx: whose they are.
            kwargs: arguments of the attention function that is called next, which finds this cache among them.

        Raises:
            UnsupportedModelError: the layer has other heads than its config says, or hands over no ``kwargs``.
        """
        if kwargs is None:
            raise UnsupportedModelError(_NOT_READY)
        if layer_idx == self._first or self._groups is None:
            self._groups = self._plan()
        layout = self.layouts[layer_idx]
        for states, expected, what in zip((key_states, value_states), layout.vectors, ("keys", "values"), strict=True):
            if (states.shape[1], states.shape[3]) != expected:
                raise UnsupportedModelError(
                    f"layer {layer_idx} makes {what} of {states.shape[1]} heads x {states.shape[3]}, its config says "
                    f"{' x '.join(map(str, expected))}, and blocks are made before; use generate() for this model."
                )
        new_keys, new_values = (x.to(dtype) for x, dtype in zip((key_states, value_states), layout.dtypes, strict=True))
        for group in self._groups:
            sides, parts = self._sides_of(layer_idx, group), (group.pick(new_keys), group.pick(new_values))
            append(parts, sides, group, self.lanes[layer_idx], layout, self.impl)
            self._look_at(layout, layer_idx, group)
        kwargs["cache"], kwargs["stored"] = self, True
        return key_states, value_states

    def _look_at(self, layout: StoreLayout, layer_idx: int, group: Group) -> None:
        """Whether pages that were sealed now are beyond what scales hold; a GPU would have to be waited for."""
        sealed = group.sealed[self.lanes[layer_idx]]
        if sealed.size and not self.log.out_of_range and self.device.type == "cpu":
            planes = self.pages.planes[self.places[layer_idx].position]
            self.log.saturated(layout.saturated(planes, sealed))

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, **options: Any
    ) -> torch.Tensor:
        """Attention of a step, after :meth:`update`.

        Args:
            query: ``[1, query_heads, tokens, head_dim]``.
            keys: what :meth:`update` returned.
            values: the same for values.
            layer_idx: whose they are.
            options: ``scale``, ``softcap``, ``sinks`` and ``window`` of ``paged_attention``.

        Returns:
            ``[1, tokens, query_heads, head_dim]`` in the query's dtype.

        Raises:
            ImplementationError: the implementation that was asked for cannot run.
        """
        output = query.new_empty(query.shape[2], query.shape[1], values.shape[3])
        for group in self._groups or ():
            part = group.pick(query)
            with without_autocast(query.device.type):
                if group.exact:
                    self.log.prefill += 1
                    group.place(attend_to_itself(part, group.pick(keys), group.pick(values), **options), output)
                    continue
                pages = self._sides_of(layer_idx, group)
                chosen = choose(self.impl, part.dtype, *pages)
                self.log.attended(chosen.name, chosen.reason)
                table = group.tables[self.lanes[layer_idx]]
                group.place(paged_attention(part, *pages, table, group.after, impl=chosen, **options), output)
        return output.unsqueeze(0)
