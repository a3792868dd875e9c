"""Checks of training and export: the backbone stays, the heads move, and come back as they were."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from autodeco.engines.base import Engine, HiddenBatch
from autodeco.family import ModelPreset
from autodeco.heads.files import load_heads
from autodeco.heads.merge import merge
from autodeco.heads.modules import DecodingHeads
from autodeco.hookspecs import BuiltModel, HeadedModel
from autodeco.job import Job
from autodeco.testing.checks import CheckFailed, NotRun
from autodeco.testing.context import Context, quiet
from autodeco.testing.logits import some_batch
from autodeco.training.checkpoint import find_checkpoint, load_into
from autodeco.training.data import Sample, SampleSet
from autodeco.training.loop import train

STEPS = 2
_SAMPLES = 8
_LAYOUTS = ("native", "autodeco")
# a plugin's own heads are written as plain ones, which round otherwise
ROUNDING = 1e-6


@dataclass(frozen=True)
class Trained:
    """Heads after two steps.

    Attributes:
        headed: The heads, on the backbone that they were trained with.
        job: Of the training.
        run: The run directory, with the checkpoints.
    """

    headed: HeadedModel
    job: Job
    run: Path


def training(context: Context) -> str:
    """Two steps with every engine that there is."""
    engines = ["hf"]
    try:
        context.megatron_presets()
        engines.append("megatron")
    except NotRun as reason:
        if not reason.excused:
            raise
    count, tensors = 0, 0
    for preset in context.random_presets:
        for name in engines:
            if name == "megatron" and context.architecture(preset).no_megatron:
                continue
            tensors += _two_steps(context, preset, name)
            count += 1
    return (
        f"{STEPS} steps in {count} trainings ({', '.join(engines)}): fingerprints stay, "
        f"{tensors} tensors of heads move"
    )


def _two_steps(context: Context, preset: ModelPreset, engine: str) -> int:
    """Trains; returns the number of tensors of the heads, which have all moved."""
    where = f"preset {preset.name}, {engine} engine"
    built = context.built(preset, engine)
    before = built.engine.fingerprint()
    _frozen(built.engine, f"{where}, before the training")
    trained, start = trained_heads(context, preset, built)
    _frozen(built.engine, f"{where}, behind the training")
    if built.engine.fingerprint() != before:
        raise CheckFailed(
            "the backbone is another one after the training: its fingerprint changed",
            where=where,
            fix="nothing but the heads may be changed: see the plugin's overrides of hooks",
        )
    moved = trained.headed.heads.state_dict()
    still = [name for name, tensor in start.items() if torch.equal(tensor, moved[name])]
    if still or not start:
        raise CheckFailed(
            f"{(still or ['nothing'])[0]!r} of the heads did not move in {STEPS} steps",
            where=where,
            fix="heads need parameters that require gradients: see the override of attach_heads",
        )
    return len(start)


def _frozen(engine: Engine, where: str) -> None:
    for attribute, module in vars(engine).items():
        if not isinstance(module, nn.Module):
            continue
        for name, parameter in module.named_parameters():
            if parameter.requires_grad or parameter.grad is not None:
                raise CheckFailed(
                    f"the backbone's {name!r} is not frozen: it takes gradients",
                    where=f"{where}, {attribute}",
                    fix="freeze the whole model: requires_grad_(False)",
                )


def trained_heads(
    context: Context, preset: ModelPreset, built: BuiltModel
) -> tuple[Trained, dict[str, Tensor]]:
    """Trains new heads for two steps; returns them, and their tensors as they were.

    Raises:
        CheckFailed: The heads do not fit the model.
    """
    job = context.job(preset, built.engine.name, context.model(preset)).replace(
        max_steps=STEPS,
        learning_rate=1e-3,
        warmup_steps=0,
        global_batch=_SAMPLES // STEPS,
        micro_batch_tokens=128,
        save_every=STEPS,
        eval_every=STEPS,
    )
    headed = context.hooks.attach_heads(job=job, model=built)
    _fitting(headed, built, preset)
    start = {name: tensor.clone() for name, tensor in headed.heads.state_dict().items()}
    run = (
        context.work / f"run-{preset.name}-{built.engine.name}-{len(list(context.work.iterdir()))}"
    )
    run.mkdir()
    data = _random_samples(preset.shape.vocab_size)
    given = (job, built.engine, headed.heads, data, data, run, preset.name)
    with quiet():
        train(*given, digest="0", console=Console(quiet=True))
    return Trained(headed, job, run), start


def _fitting(headed: HeadedModel, built: BuiltModel, preset: ModelPreset) -> None:
    if headed.model is not built:
        raise CheckFailed(
            "attach_heads returns another model than it was given",
            where=f"preset {preset.name}",
            fix="return HeadedModel(model, heads)",
        )
    wrong = [
        name
        for name, parameter in headed.heads.named_parameters()
        if parameter.dtype != torch.float32 or not parameter.requires_grad
    ]
    if not isinstance(headed.heads, DecodingHeads) or wrong:
        raise CheckFailed(
            f"the heads have {wrong[0]!r}, which is not float32 or takes no gradient"
            if wrong
            else f"the heads are a {type(headed.heads).__name__}, no DecodingHeads",
            where=f"preset {preset.name}, attach_heads",
            fix="return DecodingHeads or a subclass, float32, with requires_grad",
        )
    try:
        headed.heads.predict(*hidden_of(built.engine, preset))
    except RuntimeError as error:
        raise CheckFailed(
            f"the heads cannot read the hidden states: {error}",
            where=f"preset {preset.name}, attach_heads",
            fix=f"make heads for a width of {built.hidden_size}: model.hidden_size",
        ) from error


def _random_samples(vocabulary: int) -> SampleSet:
    random = np.random.default_rng(5)
    samples = []
    for number in range(_SAMPLES):
        length = int(random.integers(12, 40))
        predict = np.arange(length) >= 4
        predict[-1] = False
        ids = random.integers(0, vocabulary, length).astype(np.int32)
        samples.append(Sample(number, ids, predict, number + 1))
    return SampleSet(tuple(samples), {}, Path("random.jsonl"))


def hidden_of(engine: Engine, preset: ModelPreset) -> tuple[Tensor, Tensor]:
    """Returns hidden states [m, d] of the kit's sequences, and their logits [m, V]."""
    (hidden,) = engine.hidden_states([some_batch(preset.shape.vocab_size)])
    assert isinstance(hidden, HiddenBatch)
    return hidden.h, hidden.h @ engine.output_weight().weight.T


def export(context: Context) -> str:
    """Trains, exports as the pipeline does, merges in both layouts, and loads again."""
    tokens = 0
    for preset in context.random_presets:
        built = context.built(preset, "hf")
        trained, _ = trained_heads(context, preset, built)
        states = hidden_of(built.engine, preset)
        wanted = trained.headed.heads.predict(*states)
        _telling(wanted, preset)
        exported = _exported(context, trained)
        own = type(trained.headed.heads) is not DecodingHeads
        first = _read(exported, states, preset)
        limit = ROUNDING if own else 0.0
        _same(first, wanted, limit, f"preset {preset.name}, exported heads")
        for layout in _LAYOUTS:
            merged = trained.run / f"merged-{layout}"
            merge(context.model(preset), exported, merged, layout=layout)
            found = _read(merged, states, preset)
            _same(found, first, 0.0, f"preset {preset.name}, merged as {layout}")
        tokens += len(wanted[0])
    return f"T and P of {tokens} tokens, exported, merged as {' and as '.join(_LAYOUTS)}: same bits"


def _exported(context: Context, trained: Trained) -> Path:
    checkpoint = find_checkpoint(trained.run / "checkpoints", "last")
    model = BuiltModel(None, trained.headed.model.weights)
    fresh = context.hooks.attach_heads(job=trained.job, model=model)
    load_into(fresh.heads, checkpoint)
    artifact = context.hooks.export_heads(
        job=trained.job,
        model=HeadedModel(model, fresh.heads, checkpoint.name),
        path=trained.run / "heads",
    )
    path: Path = artifact.path
    return path


def _read(path: Path, states: tuple[Tensor, Tensor], preset: ModelPreset) -> Any:
    return load_heads(path, hidden_size=preset.shape.hidden_size).heads.predict(*states)


def _telling(wanted: tuple[Tensor, Tensor], preset: ModelPreset) -> None:
    """Numbers that are all alike would come back from any heads."""
    for name, values in zip(("T", "P"), wanted, strict=True):
        if not float(values.std()) > 0:
            raise CheckFailed(
                f"the heads give the same {name} to all tokens",
                where=f"preset {preset.name}, attach_heads",
                fix="return heads that read the hidden states",
            )


def _same(found: Any, wanted: Any, limit: float, where: str) -> None:
    for name, mine, other in zip(("T", "P"), found, wanted, strict=True):
        apart = float((mine - other).abs().max())
        if not (torch.equal(mine, other) or apart <= limit):
            raise CheckFailed(
                f"{name} differs by {apart:.1e} from that of the trained heads",
                where=where,
                fix="export_heads must write the heads that it is given: see the plugin's override",
            )
