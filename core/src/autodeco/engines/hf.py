"""The engine that executes transformers' own model: one process, or data parallel."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autodeco.convert.shards import ShardReader, stored_tensors
from autodeco.engines.base import HiddenBatch, OutputWeight, TokenBatch
from autodeco.engines.padding import check_finite, pad_batch
from autodeco.errors import AutodecoError, NumericsError, WeightsError
from autodeco.files import read_object
from autodeco.safetensors_header import read_checkpoint
from autodeco.storage import StorageFormat

# of a config.json that is handed to transformers: each layer is an object, before a byte is read
_MOST = {
    "num_hidden_layers": 10_000,
    "num_experts": 20_000,
    "num_local_experts": 20_000,
    "n_routed_experts": 20_000,
}
_ROUNDING = 1e-2  # of the largest logit; bfloat16 has 4e-3


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
        formats: The plugin's own storage formats. What is stored in parts (FP8, MXFP4) is decoded
            as it is read, in float32, and rounded once to `dtype`.
        dropped: Tensors that the weight map leaves out.

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
        formats: Sequence[StorageFormat] = (),
        dropped: Container[str] = (),
    ) -> None:
        self.path = path
        self.device = device
        self.dtype = dtype
        self.model = _load(path, dtype, trust_remote_code, formats, dropped).to(device)
        output = self.model.get_output_embeddings()
        if output is None or getattr(output, "bias", None) is not None:
            raise WeightsError(
                "the model has no output layer, or one with a bias, which the objective lacks",
                where=str(path),
                fix="use a causal language model with a plain output layer",
            )
        self._output: Tensor = output.weight
        self._refuse_other_logits()
        self.hidden_size = int(self._output.shape[1])
        self.vocab_size = int(self._output.shape[0])
        self.data_rank = dist.get_rank() if dist.is_initialized() else 0
        self.data_world = dist.get_world_size() if dist.is_initialized() else 1
        self.counts = self.whole_samples = True
        self.packs = False
        self.stages = 1

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

    @torch.no_grad()
    def _refuse_other_logits(self) -> None:
        """Proves on two tokens that logits are the output layer's product and nothing else."""
        ids = torch.tensor([[0, 1]], device=self.device)
        states = self.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        ours = (states @ self._output.T).float()
        theirs = self.model(input_ids=ids, use_cache=False).logits.float()
        if (ours - theirs).abs().max() > _ROUNDING * ours.abs().max():
            raise WeightsError(
                "the model scales or caps its logits behind the output layer, which the objective "
                "does not know",
                where=str(self.path),
                fix="use a causal language model with a plain output layer",
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


class _LazyTensor:
    """A tensor that is read and decoded when transformers asks for its elements."""

    def __init__(self, reader: ShardReader, name: str) -> None:
        self._reader, self._name = reader, name

    def __getitem__(self, index: Any) -> Tensor:
        return self._reader.read(self._name)[index]


def _load(
    path: Path,
    dtype: torch.dtype,
    trust_remote_code: bool,
    formats: Sequence[StorageFormat],
    dropped: Container[str],
) -> Any:
    with loading_by_transformers(path), ShardReader(path, formats) as reader:
        model, info = _from_pretrained(path, dtype, trust_remote_code, reader, dropped)
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


@contextmanager
def loading_by_transformers(path: Path) -> Iterator[None]:
    """Makes whatever transformers raises on a checkpoint that it cannot use a `WeightsError`."""
    try:
        yield
    except (AutodecoError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # its own, and those of the classes that it makes of a config.json
        raise WeightsError(
            f"transformers cannot load the model: {error or type(error).__name__}",
            where=str(path),
            fix="check that the directory holds a complete checkpoint of this family",
        ) from error


def loading_options(path: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Returns how transformers may load a checkpoint: its safetensors, and no code that it brings.

    Args:
        path: The checkpoint.
        trust_remote_code: Its code may run.

    Raises:
        WeightsError: ``config.json`` names another file of weights than the one that was checked,
            or more layers or experts than any model has: transformers would make them.
    """
    where = path / "config.json"
    config = read_object(where)
    nested = config.get("text_config")
    wrong = ""
    if config.get("transformers_weights") is not None:
        wrong = f"transformers_weights names {config['transformers_weights']!r}"
    for values in (config, nested if isinstance(nested, dict) else {}):
        for key, most in _MOST.items():
            value = values.get(key, 0)
            if isinstance(value, int | float) and not value <= most:
                wrong = f"{key} is {value!r}, which no model has"
    if wrong:
        raise WeightsError(
            f"transformers must not load this model: {wrong}",
            where=str(where),
            fix="use the config.json that came with the checkpoint",
        )
    return {
        "local_files_only": True,
        "use_safetensors": True,
        "trust_remote_code": trust_remote_code,
    }


def _from_pretrained(
    path: Path,
    dtype: torch.dtype,
    trust_remote_code: bool,
    reader: ShardReader,
    dropped: Container[str],
) -> tuple[Any, dict[str, Any]]:
    """Lets transformers load the checkpoint, itself or from what we decode for it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    given: dict[str, Any] = {
        "dtype": dtype,
        "local_files_only": True,
        "output_loading_info": True,
    }
    trust = {"trust_remote_code": trust_remote_code}
    safe = loading_options(path, trust_remote_code=trust_remote_code)
    plain = all(t.format is None and name not in dropped for name, t in reader.tensors.items())
    if plain:
        loaded: tuple[Any, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(
            str(path), **{**given, **safe}
        )
        return loaded
    names = {name: name for name in reader.tensors if name not in dropped}
    config = AutoConfig.from_pretrained(str(path), local_files_only=True, **trust)
    return _from_decoded(path, reader, names, config, given, trust)


def _from_decoded(
    path: Path,
    reader: ShardReader,
    names: Mapping[str, str],
    config: Any,
    given: Mapping[str, Any],
    trust: Mapping[str, Any],
) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM, GenerationConfig

    if hasattr(config, "quantization_config"):
        del config.quantization_config
    state = {mine: _LazyTensor(reader, stored) for stored, mine in names.items()}
    with torch.device("meta"):  # the class alone knows how to load a state
        kind = type(AutoModelForCausalLM.from_config(config, **trust))
    model, info = kind.from_pretrained(None, config=config, state_dict=state, **given)
    if (path / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(str(path))
    return model, info


def stores_parts(path: Path) -> bool:
    """Whether a checkpoint keeps tensors in FP8 blocks or MXFP4.

    Raises:
        WeightsError: A shard is missing or broken, or a part of a tensor is missing.
    """
    tensors = stored_tensors(read_checkpoint(path))
    return any(tensor.format is not None for tensor in tensors.values())


def load_decoded(path: Path, dtype: torch.dtype, *, config: Any = None, prefix: str = "") -> Any:
    """Loads a checkpoint that stores tensors in parts as the engine does: decoded as it is read.

    Args:
        path: A checkpoint of a base, or one with heads beside it.
        dtype: Of the model.
        config: transformers' config of the base; default: that of the checkpoint.
        prefix: Before the names of the base's tensors; those without it are left out.

    Returns:
        transformers' model, in eval mode, on the CPU.

    Raises:
        WeightsError: A tensor is missing or damaged.
    """
    from transformers import AutoConfig

    given = {"dtype": dtype, "local_files_only": True, "output_loading_info": True}
    safe = {"local_files_only": True, "trust_remote_code": False}
    with loading_by_transformers(path), ShardReader(path) as reader:
        config = config or AutoConfig.from_pretrained(str(path), **safe)
        names = {n: n.removeprefix(prefix) for n in reader.tensors if n.startswith(prefix)}
        model, info = _from_decoded(path, reader, names, config, given, {})
    if missing := sorted(info["missing_keys"]):
        raise WeightsError(
            f"{len(missing)} tensors are missing, the first is {missing[0]!r}",
            where=str(path),
            fix="the checkpoint is incomplete: fetch or merge it again",
        )
    return model.eval()
