"""What the checks of one plugin share: its checkpoints, its engines, and what they were told."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from autodeco.convert.random_checkpoint import write_random_checkpoint
from autodeco.convert.shards import ShardReader
from autodeco.engines.base import Engine
from autodeco.errors import UsageError
from autodeco.family import Architecture, ModelPreset
from autodeco.hookspecs import BuiltModel
from autodeco.job import Job
from autodeco.plugin import FamilyPlugin
from autodeco.registry import PluginHooks, PluginRow
from autodeco.support import installed
from autodeco.testing.checks import NotRun
from autodeco.testing.layouts import LAYOUTS
from autodeco.weights import Dims, source_sizes

WEIGHTS = "model.safetensors"
# A bias that only chooses must vary less than the scores, or some experts are never chosen.
_EVERY_EXPERT = {"router.expert_bias": 0.25}
_LARGE = {
    "embedding.word_embeddings.weight": 8.0,
    "pre_mlp_layernorm.weight": 8.0,
    # a router that saw larger values would only turn rounding into other shares
    "router.weight": 1 / 8.0,
}
Index = Path | Sequence[str]


class Context:
    """One plugin under test.

    Args:
        row: The plugin, and where it came from.
        work: A directory for checkpoints.
        presets: Names of the random presets to compute with; empty: all of them.
        layouts: Layouts of two processes, as ``--layout`` writes them.
        index: Preset -> tensor names of a published checkpoint, or a file that has them; "" stands
            for the preset that they fit.
        locator: How another process finds the plugin: its id, or ``module:name`` of one that is not
            installed; default: the id.
    """

    def __init__(
        self,
        row: PluginRow,
        work: Path,
        *,
        presets: Sequence[str] = (),
        layouts: Sequence[str] = LAYOUTS,
        index: Mapping[str, Index] | None = None,
        locator: str | None = None,
    ) -> None:
        assert row.plugin is not None
        self.row, self.work = row, work
        self.plugin: FamilyPlugin = row.plugin
        self.family, self.who = row.plugin.family, row.who
        self.layouts, self.index = tuple(layouts), dict(index or {})
        self.locator = locator or row.id
        self._chosen = tuple(presets)
        self._sizes: dict[str, dict[str, Dims]] = {}
        self._models: dict[tuple[str, bool], Path] = {}
        self._built: dict[tuple[str, str, bool], BuiltModel] = {}

    @property
    def hooks(self) -> PluginHooks:
        """Returns the plugin's hooks."""
        return PluginHooks(self.plugin, self.row)

    @property
    def random_presets(self) -> tuple[ModelPreset, ...]:
        """Returns the presets that are small enough to compute."""
        if self._chosen:
            return tuple(self.family.preset(name) for name in self._chosen)
        return tuple(preset for preset in self.family.presets if preset.random)

    def sizes(self, preset: ModelPreset) -> dict[str, Dims]:
        """Returns every source name of a preset -> its shape, as the weight map has it.

        Raises:
            WeightsError: The map reads an element twice or not at all, or fills a target twice.
        """
        if preset.name not in self._sizes:
            rules = self.family.weight_map.expand(preset.shape)
            self._sizes[preset.name] = source_sizes(rules)
        return self._sizes[preset.name]

    def architecture(self, preset: ModelPreset) -> Architecture:
        """Returns a preset's architecture."""
        return self.family.architecture(preset.architecture)

    def model(self, preset: ModelPreset, *, large: bool = False) -> Path:
        """Returns a checkpoint in which every parameter is drawn at random.

        Args:
            preset: Its shape, and how it is stored.
            large: Embedding and the norms before feed-forward blocks are several times as large,
                so that activations are.
        """
        key = preset.name, large
        if key not in self._models:
            path = self.work / (preset.name + ("-large" if large else ""))
            write_random_checkpoint(self.family, preset, path)
            self._multiply(preset, path / WEIGHTS, _EVERY_EXPERT)
            if large:
                self._multiply(preset, path / WEIGHTS, _LARGE)
            self._models[key] = path
        return self._models[key]

    def _multiply(self, preset: ModelPreset, file: Path, factors: Mapping[str, float]) -> None:
        """Multiplies what is stored as it is, by the ends of the names of its targets."""
        tensors = load_file(file)
        for rule in self.family.weight_map.expand(preset.shape):
            for name in rule.sources if rule.target.endswith(tuple(factors)) else ():
                if name in tensors and tensors[name].is_floating_point():
                    [factor] = [f for end, f in factors.items() if rule.target.endswith(end)]
                    tensors[name] = (tensors[name] * factor).to(tensors[name].dtype)
        file.unlink()  # the loaded tensors are views of it
        save_file(tensors, file, metadata={"format": "pt"})

    def job(self, preset: ModelPreset, engine: str, model: Path) -> Job:
        """Returns a job of one process, in float32 on the CPU."""
        return Job(
            plugin=self.family.id,
            preset=preset.name,
            model=model,
            engine=engine,
            layout="tp=1",
            device="cpu",
            dtype="float32",
        )

    def build(self, preset: ModelPreset, engine: str, model: Path) -> BuiltModel:
        """Builds an engine on a checkpoint, through the plugin's hooks.

        Raises:
            NotRun: megatron-core is not there, or the plugin says that it cannot run the preset.
        """
        if engine == "megatron":
            self.require_megatron(preset)
        job = self.job(preset, engine, model)
        with quiet():
            weights = self.hooks.import_weights(job=job)
            built: BuiltModel = self.hooks.build_model(job=job, weights=weights)
        return built

    def built(self, preset: ModelPreset, engine: str, *, large: bool = False) -> BuiltModel:
        """Returns the engine on a checkpoint of `model`; each is built once."""
        key = preset.name, engine, large
        if key not in self._built:
            self._built[key] = self.build(preset, engine, self.model(preset, large=large))
        return self._built[key]

    def engine(self, preset: ModelPreset, name: str, *, large: bool = False) -> Engine:
        """Returns `built`'s engine."""
        engine: Engine = self.built(preset, name, large=large).engine
        return engine

    def tensors(self, model: Path) -> dict[str, Tensor]:
        """Returns the tensors of the model, decoded, in float32."""
        with ShardReader(model, self.family.formats) as reader:
            return {name: reader.read(name).float().contiguous() for name in reader.tensors}

    def plain(self, model: Path, directory: Path, tensors: Mapping[str, Tensor]) -> Path:
        """Writes tensors as a checkpoint in which nothing is stored in parts.

        Args:
            model: Whose ``config.json`` it gets.
            directory: To appear.
            tensors: Of the model, by their names in the checkpoint.
        """
        directory.mkdir(parents=True)
        config = json.loads((model / "config.json").read_text())
        config.pop("quantization_config", None)
        (directory / "config.json").write_text(json.dumps(config))
        save_file(dict(tensors), directory / WEIGHTS, metadata={"format": "pt"})
        return directory

    def require_megatron(self, preset: ModelPreset | None = None) -> None:
        """Checks that the megatron engine can be had.

        Raises:
            NotRun: megatron-core is not there, or the plugin says that it cannot run the preset.
        """
        reason = self.architecture(preset).no_megatron if preset else ""
        if reason:
            raise NotRun(
                f"the plugin says that the megatron engine cannot run it: {reason}",
                fix="nothing, as long as that is so",
                excused=True,
            )
        if "megatron-core" not in installed("megatron-core"):
            raise NotRun("megatron-core is not installed", fix="pip install 'autodeco[megatron]'")

    def megatron_presets(self) -> tuple[ModelPreset, ...]:
        """Returns the random presets that the megatron engine can run.

        Raises:
            NotRun: megatron-core is not there, or there are none.
        """
        found = [p for p in self.random_presets if not self.architecture(p).no_megatron]
        if not found and self.random_presets:
            self.require_megatron(self.random_presets[0])
        self.require_megatron()
        return tuple(found)

    def leave_groups(self) -> None:
        """Leaves the process group of one that engines form; they are built anew when asked for.

        Raises:
            UsageError: This process is one of several.
        """
        import torch.distributed as dist

        for key in [key for key in self._built if key[1] == "megatron"]:
            del self._built[key]
        if not dist.is_initialized():
            return
        if dist.get_world_size() > 1:
            raise UsageError(
                "the checks start their own processes, and this is one of several",
                fix="run them without torchrun",
            )
        if "megatron-core" in installed("megatron-core"):
            with quiet():
                from megatron.core import parallel_state
            if parallel_state.model_parallel_is_initialized():
                parallel_state.destroy_model_parallel()
        dist.destroy_process_group()  # type: ignore[attr-defined]


def indexes(
    given: Path | str | Mapping[str, Path | str | Sequence[str]] | None,
) -> dict[str, Index]:
    """Returns an index as `Context` takes it: a file alone stands for the preset that it fits."""
    if given is None:
        return {}
    table = given if isinstance(given, Mapping) else {"": given}
    return {k: Path(v) if isinstance(v, str) else v for k, v in table.items()}


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers and megatron-core from talking; gloo finds the loopback."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
        if interface is None:
            os.environ.pop("GLOO_SOCKET_IFNAME", None)


def stock_config(config: Mapping[str, Any]) -> Any:
    """Returns transformers' configuration of a ``config.json``, read as if from a file."""
    from transformers import AutoConfig

    values = {k: v for k, v in config.items() if k not in ("architectures", "quantization_config")}
    return AutoConfig.for_model(values.pop("model_type"), **values)


def empty_model(config: Mapping[str, Any]) -> Any:
    """Returns transformers' model of a ``config.json``, without bytes."""
    from transformers import AutoModelForCausalLM

    with quiet(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(stock_config(config))
