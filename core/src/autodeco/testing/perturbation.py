"""Every stored tensor matters to every engine, and to all of them alike.

Each is changed alone, and the logits of the hf and of the megatron engine must then change, by the
same. To reload two models for each would take minutes, so the loaded ones are changed in place:
where each element of a checkpoint lies in an engine is read off an engine that was loaded from a
checkpoint whose elements are numbered.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autodeco.convert.shards import ShardReader, StoredTensor, named_function
from autodeco.engines.base import Engine
from autodeco.family import ModelPreset
from autodeco.testing.checks import CheckFailed, NotRun
from autodeco.testing.context import Context
from autodeco.testing.logits import TOLERANCE, logits_of, some_batch

SEEN = 1e-3  # logits are of the order of 1
_BATCHES = 4
_EXACT = 1 << 24  # whole numbers that float32 can tell apart


def each_tensor(context: Context) -> str:
    """Changes each stored tensor of each random preset in turn."""
    count, smallest, apart = 0, float("inf"), 0.0
    engines = _engines(context)
    for preset in context.random_presets:
        names = [name for name in engines if _runs(context, preset, name)]
        run = _Run(context, preset, names)
        for stored, name, value in perturbed(context, preset):
            changes = run.changes(name, value)
            smallest = min(smallest, *_seen(changes, stored, preset))
            apart = max(apart, _alike(changes, stored, preset))
            count += 1
    return (
        f"{count} stored tensors, {' and '.join(engines)}: each moves logits by {smallest:.1e} or "
        f"more, and the engines by the same within {apart:.1e}"
    )


def _engines(context: Context) -> tuple[str, ...]:
    try:
        context.megatron_presets()
    except NotRun as reason:
        if not reason.excused:
            raise
        return ("hf",)
    return "hf", "megatron"


def _runs(context: Context, preset: ModelPreset, engine: str) -> bool:
    return engine == "hf" or not context.architecture(preset).no_megatron


def _seen(changes: Mapping[str, Tensor], stored: str, preset: ModelPreset) -> list[float]:
    sizes = [float(change.abs().max()) for change in changes.values()]
    for engine, size in zip(changes, sizes, strict=True):
        if not size > SEEN:
            raise CheckFailed(
                f"{stored!r} hardly matters: changed alone, it moves the logits of the {engine} "
                f"engine by {size:.1e}",
                where=f"preset {preset.name}",
                fix="the engine or the decoder leaves it out, or the rule fills a parameter that "
                "nothing reads: correct the map, the storage format or the `megatron` fields (or "
                "no token goes to this expert: give the random preset fewer of them)",
            )
    return sizes


def _alike(changes: Mapping[str, Tensor], stored: str, preset: ModelPreset) -> float:
    first, *others = changes.values()
    limit = TOLERANCE * max(1.0, float(first.abs().max()))
    apart = max((float((other - first).abs().max()) for other in others), default=0.0)
    if not apart <= limit:
        raise CheckFailed(
            f"{stored!r}, changed alone, moves the logits of {' and '.join(changes)} by amounts "
            f"that differ by {apart:.1e}",
            where=f"preset {preset.name}",
            fix="a rule of the weight map puts it in another place, or in another order",
        )
    return apart


def perturbed(context: Context, preset: ModelPreset) -> Iterator[tuple[str, str, Tensor]]:
    """Yields, for each stored tensor, its name, the model's tensor that it is of, and that
    tensor's float32 value when the stored one alone is changed."""
    with ShardReader(context.model(preset), context.family.formats) as reader:
        for name, tensor in reader.tensors.items():
            if tensor.format is None:
                yield name, name, changed(reader.read(name), name)
                continue
            parts = _raw_parts(reader, tensor)
            for part in parts:
                stored = name + tensor.format.parts[part].suffix
                other = {**parts, part: changed(parts[part], stored)}
                decode = named_function(tensor.format.decode, tensor.format.name)
                yield stored, name, decode({k: v.clone() for k, v in other.items()})


def _raw_parts(reader: ShardReader, tensor: StoredTensor) -> dict[str, Tensor]:
    assert tensor.format is not None
    found = {}
    for part, info in tensor.parts.items():
        stored = tensor.name + tensor.format.parts[part].suffix
        whole = tuple((0, size) for size in info.shape)
        found[part] = reader._read(stored, info, whole)
    return found


def changed(tensor: Tensor, name: str) -> Tensor:
    """Returns a stored tensor with noise as large as its values; the same in every run.

    Of what is no plain floating point, codes and exponents, the lowest bit is turned over.
    """
    if tensor.dtype == torch.float8_e8m0fnu or not tensor.is_floating_point():
        return (tensor.view(torch.uint8) ^ 1).view(tensor.dtype)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    value = tensor.float()
    size = value.std(correction=0) if value.numel() > 1 else value.abs().max()
    size = torch.maximum(size, 0.1 * value.abs().mean())  # scales may be all alike
    noisy = value + size * torch.randn(value.shape, generator=generator)
    largest = torch.finfo(tensor.dtype).max
    return noisy.clamp(-largest, largest).to(tensor.dtype)


@dataclass(frozen=True)
class _Spot:
    """Elements of a source tensor in one tensor of an engine: where, and which they are."""

    tensor: Tensor
    places: tuple[Tensor, ...]
    elements: Tensor


class _Run:
    """The engines of one preset, and where the checkpoint's elements lie in them."""

    def __init__(self, context: Context, preset: ModelPreset, engines: list[str]) -> None:
        self._vocabulary = preset.shape.vocab_size
        self.values = context.tensors(context.model(preset))
        self.engines: dict[str, Engine] = {n: context.engine(preset, n) for n in engines}
        self.spots = {n: self._find(context, preset, n) for n in engines}
        self._before: dict[int, dict[str, Tensor]] = {}

    def changes(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """Returns how the logits of each engine change when a source has another value.

        Where nothing changes for some tokens, others are tried: few may go to one expert.
        """
        found: dict[str, Tensor] = {}
        for seed in range(_BATCHES):
            found = self._changes(name, value, seed)
            if any(bool(change.any()) for change in found.values()):
                break
        return found

    def _changes(self, name: str, value: Tensor, seed: int) -> dict[str, Tensor]:
        batch = some_batch(self._vocabulary, seed)
        if seed not in self._before:
            self._before[seed] = {n: logits_of(e, batch) for n, e in self.engines.items()}
        found = {}
        for engine in self.engines:
            self._write(engine, name, value)
            found[engine] = logits_of(self.engines[engine], batch) - self._before[seed][engine]
            self._write(engine, name, self.values[name])
        return found

    @torch.no_grad()
    def _write(self, engine: str, name: str, value: Tensor) -> None:
        flat = value.float().reshape(-1)
        for spot in self.spots[engine].get(name, ()):
            spot.tensor[spot.places] = flat[spot.elements]

    def _find(self, context: Context, preset: ModelPreset, engine: str) -> dict[str, list[_Spot]]:
        numbers, first, count = {}, {}, 0
        for name, value in self.values.items():
            first[name] = count + 1
            numbers[name] = torch.arange(count + 1, count + 1 + value.numel()).view(value.shape)
            count += value.numel()
        if count >= _EXACT:
            raise CheckFailed(
                f"the random preset has {count:,} elements, more than {_EXACT:,}",
                where=f"preset {preset.name}",
                fix="choose smaller sizes for it",
            )
        model, place = context.model(preset), context.work / f"numbered-{preset.name}"
        if not place.exists():
            context.plain(model, place, {n: t.float() for n, t in numbers.items()})
        numbered = live_tensors(context.build(preset, engine, place).engine)
        values = torch.cat([torch.zeros(1), *(v.reshape(-1) for v in self.values.values())])
        spots: dict[str, list[_Spot]] = {}
        for key, tensor in live_tensors(self.engines[engine]).items():
            ids = numbered[key].detach().reshape(-1)
            if torch.equal(ids, tensor.detach().reshape(-1)):
                continue  # it is computed, and in no checkpoint
            ids = ids.long()
            _check_followed(key, engine, tensor, ids, values)
            for name, value in self.values.items():
                inside = (ids >= first[name]) & (ids < first[name] + value.numel())
                places = inside.nonzero().squeeze(1)
                if len(places):
                    index = tuple(torch.unravel_index(places, tensor.shape))
                    spot = _Spot(tensor.detach(), index, ids[places] - first[name])
                    spots.setdefault(name, []).append(spot)
        return spots


def _check_followed(key: str, engine: str, tensor: Tensor, ids: Tensor, values: Tensor) -> None:
    """An engine that computes with what it loads cannot be changed in place."""
    inside = bool(((ids >= 0) & (ids < len(values))).all())
    if not inside or not torch.equal(values[ids], tensor.detach().reshape(-1)):
        raise CheckFailed(
            f"the {engine} engine's {key!r} does not hold elements of the checkpoint as they are",
            fix="report it: the kit cannot follow its elements",
        )


def live_tensors(engine: Any) -> dict[str, Tensor]:
    """Returns the parameters and buffers of an engine's modules, shared ones once, by name."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for attribute, module in vars(engine).items():
        if not isinstance(module, nn.Module):
            continue
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_floating_point() and tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                found[f"{attribute}.{name}"] = tensor
    return found
