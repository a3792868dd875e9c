"""Opens the checkpoint that a job names: checks it against the preset and the weight map."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from autodeco.convert.random_checkpoint import write_random_checkpoint
from autodeco.convert.shards import PLAIN, StoredTensor, stored_tensors
from autodeco.errors import PluginError, WeightsError
from autodeco.family import FamilySpec, ModelPreset
from autodeco.files import read_object
from autodeco.hookspecs import ImportedWeights
from autodeco.job import Job
from autodeco.safetensors_header import TensorInfo, read_checkpoint
from autodeco.weights import BoundWeightMap

_BLOCK = 16 << 20
_SAMPLE = 256


def open_source(family: FamilySpec, job: Job) -> ImportedWeights:
    """Proves that the weight map is total on the job's checkpoint; loads nothing.

    Args:
        family: The plugin's data.
        job: With ``model`` (a directory) and ``preset`` set; see `built_in_checkpoint`.

    Raises:
        WeightsError: A shard is missing or broken, a tensor is unmapped, missing or of a wrong
            shape, a tensor that is stored twice differs, or ``config.json`` does not fit the
            preset.
    """
    if job.model is None or job.preset is None:
        raise PluginError(
            "the job has no model or no preset", who=family.id, fix="resolve the job first"
        )
    config_path = job.model / "config.json"
    config = read_object(config_path, who=family.id)
    preset = family.preset_for(job.preset, config, where=str(config_path))
    architecture = family.architecture(preset.architecture)
    shape = architecture.shape_of(config, where=str(config_path))
    if shape != preset.shape:
        raise WeightsError(
            f"config.json does not agree with preset {preset.name!r}: {shape} is not "
            f"{preset.shape}",
            who=family.id,
            where=str(config_path),
            fix="choose the preset of this size: autodeco plugin show " + family.id,
        )
    infos = read_checkpoint(job.model)
    tensors = stored_tensors(infos, family.formats, who=family.id)
    bound = family.weight_map.bind(shape, tensors, who=family.id, where=str(job.model))
    check_tensors(bound, tensors, who=family.id)
    check_twins(bound, infos, who=family.id)
    return ImportedWeights(job.model, "hf", bound, shape, formats=family.formats)


def check_tensors(bound: BoundWeightMap, tensors: Mapping[str, StoredTensor], *, who: str) -> None:
    """Checks every tensor's shape and dtype against the weight map.

    Raises:
        WeightsError: One differs, or is of a dtype that is no plain floating point; the message
            names the tensor.
    """
    for name, size in bound.source_sizes().items():
        tensor = tensors[name]
        if tensor.shape != size:
            raise WeightsError(
                f"tensor {name!r} has the shape {tensor.shape}, expected {size}",
                who=who,
                where=str(tensor.file),
                fix="the checkpoint does not fit its config.json: fetch it again",
            )
        if tensor.format is None and tensor.dtype not in PLAIN:
            raise WeightsError(
                f"tensor {name!r} is stored as {tensor.dtype}, which nothing decodes",
                who=who,
                where=str(tensor.file),
                fix="use a checkpoint as it was published, or give the plugin a storage format",
            )


def check_twins(bound: BoundWeightMap, infos: dict[str, TensorInfo], *, who: str) -> None:
    """Compares what the checkpoint stores twice (tied embeddings), block by block.

    Raises:
        WeightsError: The two differ: ``config.json`` ties them, the checkpoint does not.
    """
    for name, of in bound.twins.items():
        mine, other = infos[name], infos[of]
        if (mine.dtype, mine.shape) != (other.dtype, other.shape) or not _equal(mine, other):
            raise WeightsError(
                f"{name!r} is stored beside {of!r} and differs from it, but config.json ties them",
                who=who,
                where=str(mine.file),
                fix="set tie_word_embeddings to false in config.json if the model has an output "
                "layer of its own, else fetch the checkpoint again",
            )


def _equal(a: TensorInfo, b: TensorInfo) -> bool:
    with a.file.open("rb") as one, b.file.open("rb") as two:
        one.seek(a.start)
        two.seek(b.start)
        for done in range(0, a.size, _BLOCK):
            count = min(_BLOCK, a.size - done)
            if one.read(count) != two.read(count):
                return False
    return True


def checkpoint_digest(directory: Path, *, times: bool = False) -> str:
    """Returns a digest of a checkpoint that is cheap: hashing terabytes at every start is not.

    It covers ``config.json``, all names, dtypes, shapes and places, and some bytes of each tensor.

    Args:
        directory: In Hugging Face format.
        times: It covers the files' times of change as well.

    Raises:
        WeightsError: A shard is missing or broken.
    """
    infos = read_checkpoint(directory)
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for name, info in sorted(infos.items(), key=lambda item: (item[1].file.name, item[1].start)):
        digest.update(f"{name} {info.dtype} {info.shape} {info.file.name} {info.start}\n".encode())
        with info.file.open("rb") as stream:
            stream.seek(info.start + info.size // 2)
            digest.update(stream.read(min(_SAMPLE, info.size - info.size // 2)))
    for file in sorted({info.file for info in infos.values()} if times else ()):
        digest.update(f"{file.name} {file.stat().st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def built_in_checkpoint(family: FamilySpec, preset: ModelPreset, directory: Path) -> Path:
    """Returns the preset's own checkpoint, drawing a random one at `directory` where it is so.

    Raises:
        PluginError: The preset has none; the user has to give a model.
    """
    require_built_in(family, preset)
    package = resources.files(family.package)
    if preset.checkpoint is not None:
        return _folder(package / preset.checkpoint, family, preset)
    if not directory.exists():
        tokenizer = package / preset.tokenizer if preset.tokenizer else None
        source = _folder(tokenizer, family, preset) if tokenizer else None
        write_random_checkpoint(family, preset, directory, tokenizer=source)
    return directory


def require_built_in(family: FamilySpec, preset: ModelPreset) -> None:
    """Checks that the preset comes with a checkpoint; writes nothing.

    Raises:
        PluginError: It has none; the user has to give a model.
    """
    if preset.checkpoint is not None or preset.random:
        return
    ids = ", ".join(preset.model_ids) or "any of this shape"
    raise PluginError(
        f"preset {preset.name!r} has no built-in model",
        who=family.id,
        fix=f"add --model DIR with a checkpoint ({ids})",
    )


def _folder(resource: object, family: FamilySpec, preset: ModelPreset) -> Path:
    if isinstance(resource, Path) and resource.is_dir():
        return resource
    raise PluginError(
        f"the built-in files of preset {preset.name!r} are not on disk",
        who=family.id,
        where=str(resource),
        fix="reinstall the plugin (unpacked: not from a zip)",
    )
