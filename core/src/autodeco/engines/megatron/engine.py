"""The engine that executes megatron-core's GPTModel: tensor, pipeline, expert, data parallel."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from autodeco.engines.base import HiddenBatch, OutputWeight, TokenBatch
from autodeco.engines.megatron.attention import Microbatch, announce
from autodeco.engines.megatron.compat import apply_cures
from autodeco.engines.megatron.context import positions_of
from autodeco.engines.megatron.loading import Place, load_stage, stored_state
from autodeco.engines.megatron.model import (
    build_stage,
    stack_experts,
)
from autodeco.engines.megatron.rotary import rotary_of
from autodeco.engines.megatron.settings import transformer_config
from autodeco.engines.padding import check_finite, lay_end_to_end, pad_batch
from autodeco.family import Architecture
from autodeco.files import read_json
from autodeco.hookspecs import ImportedWeights
from autodeco.layout import ParallelLayout


class MegatronEngine:
    """A frozen backbone spread over ranks.

    It only runs forward: a stage receives hidden states, computes, sends them on and forgets them.
    All shapes follow from the batches, which every stage of a copy of the model has, so stages
    agree on them without a word. The ranks that share experts run the same number of microbatches
    of the same padded shape; who has none left runs padding for the others.

    Args:
        weights: The checkpoint, as it is on the hub.
        architecture: Which of the family's architectures it is.
        layout: How to spread it; see `ParallelLayout.data_ranks`.
        device: This process's.
        dtype: The backbone's dtype.
        packing: Sequences are laid end to end instead of padded. Context-parallel ranks pad.

    Raises:
        WeightsError: The checkpoint does not fit.
        NumericsError: A weight is not finite.
    """

    name = "megatron"

    def __init__(
        self,
        weights: ImportedWeights,
        architecture: Architecture,
        layout: ParallelLayout,
        device: torch.device,
        dtype: torch.dtype,
        *,
        packing: bool = True,
    ) -> None:
        self.path, self.device, self.dtype, self.layout = weights.path, device, dtype, layout
        shape = weights.shape
        self.hidden_size, self.vocab_size = shape.hidden_size, shape.vocab_size
        apply_cures()
        form_groups(layout, device)
        where = weights.path / "config.json"
        config = read_json(where)
        self._latent = shape.is_latent
        self._rotary = rotary_of(config, str(where), shape.rope_head_dim or shape.head_dim)
        self.first = parallel_state.is_pipeline_first_stage()
        self.last = parallel_state.is_pipeline_last_stage()
        self._model = build_stage(
            transformer_config(shape, architecture, config, layout, dtype, device),
            shape,
            architecture,
            first=self.first,
            last=self.last,
        )
        load_stage(self._model, weights, _place())
        stack_experts(self._model.to(device))
        self._sent: Any = None
        self._together = (
            parallel_state.get_expert_model_parallel_group() if layout.expert > 1 else None
        )
        self.data_rank = int(parallel_state.get_data_parallel_rank())
        self.data_world = int(parallel_state.get_data_parallel_world_size())
        self._context_rank = int(parallel_state.get_context_parallel_rank())
        self.whole_samples = layout.context == 1
        self.packs = packing and layout.context == 1
        self.stages = layout.pipeline
        tensor = parallel_state.get_tensor_model_parallel_rank()
        self.counts = bool(self.last and tensor == 0)

    @torch.no_grad()
    def hidden_states(self, batches: Iterable[TokenBatch]) -> Iterator[HiddenBatch | None]:
        """Yields the hidden states of each batch's predicting positions, in order.

        Off the last pipeline stage it yields None for each batch.

        Raises:
            NumericsError: A hidden state is not finite.
        """
        iterator = iter(batches)
        while True:
            batch = next(iterator, None)
            shape = self._agreed_shape(batch)
            if shape is None:
                break
            if self.packs:
                ids, flat, bounds = lay_end_to_end(batch, shape[1])
            else:
                ids, flat, bounds = *pad_batch(batch, *shape), ()
            mine = positions_of(self._context_rank, self.layout.context, ids.shape[1])
            self._announce(mine, bounds)
            states = self._forward(ids[:, mine])
            if batch is None:
                continue
            yield self._chosen(states, batch, flat, mine) if self.last else None
        self._wait()

    def _agreed_shape(self, batch: TokenBatch | None) -> tuple[int, int] | None:
        """Rows and length to pad to, the same on all ranks that share experts; None at the end."""
        mine = [0, 0]
        if batch is not None:
            lengths = batch.cu_seqlens.diff()
            mine = [1, len(batch.ids)] if self.packs else [len(lengths), int(lengths.max())]
        if self._together is not None:
            box = torch.tensor(mine, device=self.device)
            dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self._together)
            mine = box.tolist()
        if not mine[0]:
            return None
        step = 2 * self.layout.context if self.layout.context > 1 else 1
        return mine[0], -(-mine[1] // step) * step

    def _announce(self, mine: Tensor, bounds: tuple[int, ...]) -> None:
        """Tells the attention layers what the microbatch is made of."""
        positions, cu_seqlens = mine, None
        if bounds:
            starts = torch.tensor(bounds, dtype=torch.int32)
            positions = mine - torch.repeat_interleave(starts[:-1], starts.diff())
            cu_seqlens = starts.to(self.device)
        if self._latent:
            angles = self._rotary.angles(positions).to(self.device)
            now = Microbatch(None, None, bounds, cu_seqlens, angles, self._rotary.scale)
        else:
            cos, sin = self._rotary.tables(positions, self.dtype, self.device)
            now = Microbatch(cos, sin, bounds, cu_seqlens)
        announce(self._model, now)

    def _forward(self, ids: Tensor) -> Tensor:
        """Runs the stage on ids [b, s], of this context rank; returns [b, s, d] on the last one."""
        ids = ids.to(self.device)
        rows, length = ids.shape
        if not self.first:
            shape = (length, rows, self.hidden_size)
            received = torch.empty(shape, dtype=self.dtype, device=self.device)
            dist.recv(received, src=parallel_state.get_pipeline_model_parallel_prev_rank())
            self._model.set_input_tensor(received)
        positions = torch.arange(length, device=self.device).expand(rows, -1)
        out: Tensor = self._model(ids, positions, None)
        if not self.last:
            self._wait()
            out = out.contiguous()
            # the stage goes on with the next batch while this one travels
            target = parallel_state.get_pipeline_model_parallel_next_rank()
            self._sent = (dist.isend(out, dst=target), out)
        return out

    def _wait(self) -> None:
        if self._sent is not None:
            self._sent[0].wait()
            self._sent = None

    def _chosen(
        self, states: Tensor, batch: TokenBatch, flat: Tensor, positions: Tensor
    ) -> HiddenBatch:
        """The states of the batch's predicting positions that this context rank holds."""
        index = batch.predict.nonzero().squeeze(1)
        if self.layout.context > 1:
            column = torch.full((len(positions) * self.layout.context,), -1)
            column[positions] = torch.arange(len(positions))
            index = index[column[batch.positions[index]] >= 0]
            row = flat[index] // len(column)
            at = row * len(positions) + column[batch.positions[index]]
        else:
            at = flat[index]
        h = states.flatten(0, 1)[at.to(self.device)]
        sample_id, position = batch.sample_id[index], batch.positions[index]
        check_finite(h, sample_id, position)
        label = batch.ids[index + 1].to(self.device)
        return HiddenBatch(h, label, sample_id.to(self.device), position.to(self.device))

    def output_weight(self) -> OutputWeight:
        """Returns this tensor rank's rows of the output layer; none off the last stage."""
        if not self.last:
            empty = torch.empty(0, self.hidden_size, dtype=self.dtype, device=self.device)
            return OutputWeight(empty, 0, self.vocab_size)
        weight = self._model.output_layer.weight.detach()
        rank = parallel_state.get_tensor_model_parallel_rank()
        group = parallel_state.get_tensor_model_parallel_group() if self.layout.tensor > 1 else None
        return OutputWeight(weight, rank * weight.shape[0], self.vocab_size, group)

    def fingerprint(self) -> str:
        """Returns a sha256 over names, dtypes, shapes and bytes of this rank's parameters."""
        digest = hashlib.sha256()
        for name, tensor in sorted(stored_state(self._model)):
            tensor = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def form_groups(layout: ParallelLayout, device: torch.device) -> None:
    """Makes megatron-core's process groups, once in a process."""
    if not dist.is_initialized():
        # gloo beside nccl: another engine of this process may run on the CPU
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        create_gloo_process_groups=False,
    )


def _place() -> Place:
    return Place(
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_expert_model_parallel_rank(),
        parallel_state.get_expert_model_parallel_world_size(),
        parallel_state.get_expert_tensor_parallel_rank(),
        parallel_state.get_expert_tensor_parallel_world_size(),
    )
