"""The engine that executes transformers' own model: one process, or data parallel."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autodeco.engines.base import HiddenBatch, OutputWeight, TokenBatch
from autodeco.engines.padding import check_finite, pad_batch
from autodeco.errors import NumericsError, WeightsError


class HFEngine:
    """A frozen transformers model.

    Sequences are right-padded to the longest of their batch and causal attention alone keeps pads
    out, so no mask is built, attention takes its fastest path, and no sequence sees another. Only
    the decoder runs: no logits are made.

    Args:
        path: A Hugging Face checkpoint directory.
        device: Where the backbone lives.
        dtype: The backbone's dtype.
        trust_remote_code: Run model code that comes with the checkpoint.

    Raises:
        WeightsError: transformers cannot load it, or not completely.
        NumericsError: A weight is not finite.
    """

    name = "hf"

    def __init__(
        self,
        path: Path,
        device: torch.device,
        dtype: torch.dtype,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        self.path = path
        self.device = device
        self.dtype = dtype
        self.model = _load(path, dtype, trust_remote_code).to(device)
        output = self.model.get_output_embeddings()
        if output is None or getattr(output, "bias", None) is not None:
            raise WeightsError(
                "the model has no output layer, or one with a bias, which the objective lacks",
                where=str(path),
                fix="use a causal language model with a plain output layer",
            )
        self._output: Tensor = output.weight
        self.hidden_size = int(self._output.shape[1])
        self.vocab_size = int(self._output.shape[0])
        self.data_rank = dist.get_rank() if dist.is_initialized() else 0
        self.data_world = dist.get_world_size() if dist.is_initialized() else 1
        self.counts = self.whole_samples = True
        self.packs = False

    @torch.no_grad()
    def hidden_states(self, batches: Iterable[TokenBatch]) -> Iterator[HiddenBatch | None]:
        """Yields the hidden states of each batch's predicting positions, in order.

        Raises:
            NumericsError: A hidden state is not finite.
        """
        decoder = self.model.get_decoder()
        for batch in batches:
            ids, flat = pad_batch(batch)
            states = decoder(input_ids=ids.to(self.device), use_cache=False).last_hidden_state
            index = batch.predict.nonzero().squeeze(1)
            h = states.flatten(0, 1)[flat[index].to(self.device)]
            sample_id, position = batch.sample_id[index], batch.positions[index]
            check_finite(h, sample_id, position)
            yield HiddenBatch(
                h=h,
                label=batch.ids[index + 1].to(self.device),
                sample_id=sample_id.to(self.device),
                token_index=position.to(self.device),
            )

    def output_weight(self) -> OutputWeight:
        """Returns the whole output layer."""
        return OutputWeight(self._output.detach(), 0, self.vocab_size)

    def fingerprint(self) -> str:
        """Returns a sha256 over names, dtypes, shapes and bytes of all parameters and buffers."""
        digest = hashlib.sha256()
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        for name in sorted(tensors):
            tensor = tensors[name].detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _load(path: Path, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(path),
            dtype=dtype,
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise WeightsError(
            f"transformers cannot load the model: {error}",
            where=str(path),
            fix="check that the directory holds a complete checkpoint of this family",
        ) from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(map(str, info.get(problem) or ()))
        if names:
            raise WeightsError(
                f"transformers reports {len(names)} {problem.replace('_', ' ')}: {names[0]}",
                where=str(path),
                fix="the checkpoint does not fit the architecture in its config.json",
            )
    model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise NumericsError(
                f"the weight {name!r} holds NaN or infinity",
                where=str(path),
                fix="the checkpoint is damaged, or its values do not fit --dtype: fetch it again, "
                "or try --dtype float32",
            )
    return model
