"""Finds and reads the heads in a torch.distributed.checkpoint directory, as NeMo 2 writes them.

Such a checkpoint holds the whole model; of it, the heads' own bytes are read, and no others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from autodeco.convert.stored import HF_FILES, WEIGHTS
from autodeco.convert.torch_dist_metadata import METADATA
from autodeco.convert.torch_dist_reader import TorchDistReader
from autodeco.errors import UsageError, WeightsError
from autodeco.files import read_object
from autodeco.heads.files import heads_from
from autodeco.heads.identity import CONFIG_FILE, base_identity
from autodeco.heads.modules import DecodingHeads

_RUN_FOLDER = "checkpoints"
# an adapter's tensors, below whatever the training wrapped the model in
_HEAD = re.compile(r"(?P<prefix>(?:.+\.)?)(?P<name>(?:temp_head|top_p_head)\..+)")
_NAMES = frozenset(
    f"{head}.mlp.{layer}.{kind}"
    for head in ("temp_head", "top_p_head")
    for layer in (0, 2)
    for kind in ("weight", "bias")
)
# an optimizer keeps copies and moments of the same tensors under names that end alike
_OPTIMIZER = re.compile(r"(?:^|\.)(?:optimizer|exp_avg|exp_avg_sq|fp32_param)\.")


def weights_directory(path: Path) -> Path | None:
    """Returns the directory with ``.metadata``: `path` or its ``weights``; None: there is none."""
    return next((d for d in (path / WEIGHTS, path) if (d / METADATA).is_file()), None)


def refuse_many(path: Path) -> None:
    """Refuses a directory of several checkpoints: which of them is meant is not guessed.

    Raises:
        UsageError: There are checkpoints below it.
    """
    folders = [f for f in (path, path / _RUN_FOLDER) if f.is_dir()]
    inside = sorted(d for f in folders for d in f.iterdir() if d.is_dir() and weights_directory(d))
    if inside:
        last = next((d for d in inside if d.name.endswith("-last")), inside[-1])
        raise UsageError(
            f"the directory holds {len(inside)} checkpoints: "
            + ", ".join(d.name for d in inside[:5])
            + (", ..." if len(inside) > 5 else ""),
            where=str(path),
            fix=f"name the one that is meant, for example --input {last}",
        )


def read_adapter_heads(
    weights: Path, *, hidden_size: int | None = None
) -> tuple[DecodingHeads, str]:
    """Reads the heads.

    Args:
        weights: See `weights_directory`.
        hidden_size: Of the base, where it is known.

    Returns:
        The heads, float32, and the dtype that they are stored in.

    Raises:
        WeightsError: There are none, or several; one of their tensors is missing, unknown, damaged
            or of a wrong shape; or they are of another width than the base.
    """
    with TorchDistReader(weights) as reader:
        keys = head_keys(reader.metadata, weights)
        tensors: dict[str, Tensor] = {name: reader.read(key) for name, key in keys.items()}
    heads = heads_from(tensors, weights, hidden_size=hidden_size)
    if hidden_size not in (None, heads.config.hidden_size):
        raise WeightsError(
            f"the heads read hidden states of width {heads.config.hidden_size}, the model has "
            f"{hidden_size}",
            where=str(weights),
            fix="give --model the checkpoint that the heads were trained on",
        )
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    return heads, dtypes.pop() if len(dtypes) == 1 else "float32"


def head_keys(keys: Iterable[str], where: Path) -> dict[str, str]:
    """Returns a head's tensor -> its key, of all keys of a checkpoint.

    Raises:
        WeightsError: There are no heads, they are there under several prefixes, or a key among
            them is no tensor of heads.
    """
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        match = _HEAD.fullmatch(key)
        if match is not None and _OPTIMIZER.search(match["prefix"]) is None:
            found.setdefault(match["prefix"], {})[match["name"]] = key
    if len(found) != 1:
        what = "the checkpoint has no heads" if not found else "the checkpoint has heads twice, at "
        raise WeightsError(
            what + " and ".join(repr(prefix) for prefix in sorted(found)),
            where=str(where),
            fix="give a checkpoint of a run that trained the heads of one model",
        )
    (mine,) = found.values()
    unknown = sorted(mine.keys() - _NAMES)
    if unknown:
        raise WeightsError(
            f"{mine[unknown[0]]!r} is no tensor of the heads",
            where=str(where),
            fix="heads are named temp_head.mlp.{0,2}.* and top_p_head.mlp.{0,2}.*",
        )
    return mine


def known_base(weights: Path, model: Path | None) -> dict[str, Any]:
    """Returns what is known of the model that the heads of a checkpoint were trained on.

    Args:
        weights: See `weights_directory`.
        model: The base, if the user named it; else it is looked for beside the weights, where an
            import puts a copy of its config.

    Raises:
        WeightsError: The model's ``config.json`` cannot be used.
    """
    beside = weights.parent / HF_FILES
    base = model or (beside if (beside / CONFIG_FILE).is_file() else None)
    if base is None:
        return {}
    identity = base_identity(base)
    if model is None and "_name_or_path" not in read_object(beside / CONFIG_FILE):
        identity["base_model_name_or_path"] = None  # the folder's own name says nothing
    return identity
