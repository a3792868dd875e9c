"""Keys and values of a batch: how they are kept, and how many rows a device has room for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FLOOR_BYTES = 2**30  # what a CPU always gives, so that small models decode alike everywhere
_CPU_SHARE = 0.25  # of the memory that is free: others compute on the machine as well
_CUDA_SHARE = 0.85  # of what is free after the reserve: an allocator cannot use every byte
_CUDA_RESERVE = 2**30
_MOST_ROWS = 1024
_BLOCK = 256  # tokens that a cache grows by


def rows_that_fit(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """How many answers can be decoded at once, were each of them as long as it may be.

    Rows that end early make room, yet no more rows are begun for it: where a batch fills the
    memory, reading keys and values takes nearly all of a step's time already, and twice the rows
    would take twice as long.

    Args:
        model: a transformers causal language model.
        prompts: token ids of each.
        max_new_tokens: longest answer.
    """
    longest = max((len(prompt) for prompt in prompts), default=1)
    config = model.config.get_text_config(decoder=True)
    each = _row_bytes(config, longest, max_new_tokens, model.dtype.itemsize)
    each += 48 * int(model.get_output_embeddings().weight.shape[0])  # logits and their order
    return max(1, min(_MOST_ROWS, _budget(model.device) // each))


def _row_bytes(config: Any, prompt: int, new: int, itemsize: int) -> int:
    """The most that a row takes, when its prompt is read or when its answer is at its longest."""
    heads = getattr(config, "num_attention_heads", 1)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    both = 2 * size
    if getattr(config, "qk_nope_head_dim", None) is not None:  # latent attention, cached unpacked
        both = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    kept = (getattr(config, "num_key_value_heads", None) or heads) * config.num_hidden_layers
    cache = both * (kept + heads) * itemsize  # one layer's once more, repeated for its query heads
    experts = (getattr(config, "num_experts_per_tok", None) or 0) * (
        getattr(config, "moe_intermediate_size", None) or 0
    )
    ffn = max(getattr(config, "intermediate_size", None) or 4 * config.hidden_size, experts)
    reading = (3 * ffn + 8 * config.hidden_size) * itemsize + 4 * prompt  # the last: the mask
    return int(max(prompt * (cache + reading), (prompt + new) * cache))


def _budget(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(0, int((free - _CUDA_RESERVE) * _CUDA_SHARE))
    return max(_FLOOR_BYTES, int(_CPU_SHARE * _free_memory()))


def _free_memory() -> int:
    """Bytes that are free on this machine and in this container; 0 where nobody tells."""
    free = 0
    with contextlib.suppress(ValueError, OSError, AttributeError):  # not on every platform
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(ValueError, OSError):  # ValueError: "max", without a limit
        limit = int((group / "memory.max").read_text())
        free = min(free, max(0, limit - int((group / "memory.current").read_text())))
    return free


def growing_cache(config: Any, capacity: int) -> Any:
    """A cache whose full-attention layers append in place and grow by blocks of tokens.

    Args:
        config: of the decoder.
        capacity: tokens that it will never exceed.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class Growing(DynamicLayer):  # type: ignore[misc]  # transformers is untyped
        """Appends in place, where its parent copies all keys and values at every token."""

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.used, self.room = 0, (key_states[:, :, :0], value_states[:, :, :0])
            end = self.used + key_states.shape[-2]
            if self.used == 0:
                # A prompt is run once and its rows are made from it: room comes with the rows.
                self.keys, self.values = key_states, value_states
            else:
                if self.room[0].shape[-2] < end:
                    # One after the other: both at once would need twice the spare memory.
                    self.room = (self._grow(self.keys, end), self.room[1])
                    self.keys = self.room[0]
                    self.room = (self.room[0], self._grow(self.values, end))
                self.room[0][:, :, self.used : end] = key_states
                self.room[1][:, :, self.used : end] = value_states
                self.keys, self.values = (buffer[:, :, :end] for buffer in self.room)
            self.used = end
            return self.keys, self.values

        def _grow(self, filled: Tensor, end: int) -> Tensor:
            length = max(end, min(capacity, end + _BLOCK))
            buffer = filled.new_empty((*filled.shape[:2], length, filled.shape[-1]))
            buffer[:, :, : self.used] = filled[:, :, : self.used]
            return buffer

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self.room = (self.keys[:, :, :0], self.values[:, :, :0])

    cache = DynamicCache(config=config)
    cache.layers = [Growing() if type(x) is DynamicLayer else x for x in cache.layers]
    return cache
