"""How published checkpoints store their weights: blocks of FP8 (DeepSeek-V3), MXFP4 (gpt-oss).

For the demo models of ``make_demo_model.py``: a model is trained on what its stored weights will
decode to (:func:`train_rounded`), and written under the names that the published checkpoints have
(:func:`stored_state`). The decoders are the package's. The encoders are not, for they choose other
scales than the package does for random checkpoints: those of :func:`encode_fp8` are right for
transformers' reading of partial blocks too, and those of :func:`encode_mxfp4` cut nothing off.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch.nn import functional
from torch.nn.utils import parametrize

from autodeco.convert import formats

FP8_BLOCK = 128
FP8_LARGEST = 448.0
FP4_BLOCK = 32
FP4_LARGEST = 6.0
FP4_BORDERS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
E8M0_BIAS = 127
MTP_SCALE = 0.02


def encode_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float matrices [..., rows, columns] -> F8_E4M3 values and F32 scales of 128 x 128 blocks."""
    rows, columns = weight.shape[-2:]
    padded = functional.pad(weight.abs(), (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    blocks = torch.unflatten(torch.unflatten(padded, -1, (-1, FP8_BLOCK)), -3, (-1, FP8_BLOCK))
    largest = blocks.amax((-3, -1))
    # Where blocks do not fill a dimension, transformers (5.17 to 5.23) shares it out evenly among
    # the scales, against the format. A scale that these blocks have in common is right both ways.
    if rows % FP8_BLOCK:
        largest = largest.amax(-2, keepdim=True).expand_as(largest)
    if columns % FP8_BLOCK:
        largest = largest.amax(-1, keepdim=True).expand_as(largest)
    scales = largest.clamp(min=1e-12).contiguous() / FP8_LARGEST
    spread = scales.repeat_interleave(FP8_BLOCK, -2).repeat_interleave(FP8_BLOCK, -1)
    values = weight / spread[..., :rows, :columns]
    return values.to(torch.float8_e4m3fn), scales


def decode_fp8(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The float32 matrices that :func:`encode_fp8` stored."""
    if values.dim() > 2:
        pairs = zip(values, scales, strict=True)
        return torch.stack([decode_fp8(one, scale) for one, scale in pairs])
    return formats.decode_fp8_blocks({"weight": values, "scale": scales})


def encode_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float matrices [..., rows, columns] -> U8 blocks [..., rows, columns / 32, 16] and scales.

    A byte holds two values, the first in its low half; a scale is an exponent of two, biased.
    """
    blocks = torch.unflatten(weight, -1, (-1, FP4_BLOCK))
    largest = blocks.abs().amax(-1).clamp(min=1e-12)
    exponents = torch.ceil(torch.log2(largest / FP4_LARGEST))
    scaled = blocks / torch.exp2(exponents)[..., None]
    borders = torch.tensor(FP4_BORDERS, device=weight.device)
    codes = torch.bucketize(scaled.abs().contiguous(), borders).to(torch.uint8)
    codes += 8 * (scaled < 0).to(torch.uint8)
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return packed, (exponents + E8M0_BIAS).to(torch.uint8)


def decode_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The float32 matrices [..., rows, columns] that :func:`encode_mxfp4` stored."""
    return formats.decode_mxfp4({"blocks": blocks, "scales": scales}).mT


class StorageFormat(Protocol):
    """Which weights of a live model a format takes, and what it makes of them."""

    config: dict[str, Any]

    def attributes(self, name: str, module: torch.nn.Module) -> tuple[str, ...]:
        """The parameters of this module that are stored in the format."""

    def rounded(self, attribute: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight as it will be read back, in the live model's layout."""

    def stored(self, name: str, attribute: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The weight's tensors under their published names; ``name`` is the module's."""


class Fp8Blocks:
    """DeepSeek-V3: every linear layer and expert of the decoder, each expert by itself."""

    def __init__(self) -> None:
        self.config: dict[str, Any] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        }

    def attributes(self, name: str, module: torch.nn.Module) -> tuple[str, ...]:
        if name.endswith(".experts"):
            return ("gate_up_proj", "down_proj")
        linear = isinstance(module, torch.nn.Linear) and name.startswith("model.layers.")
        return ("weight",) if linear else ()

    def rounded(self, attribute: str, weight: torch.Tensor) -> torch.Tensor:
        return decode_fp8(*encode_fp8(self._matrices(attribute, weight))).reshape(weight.shape)

    def stored(self, name: str, attribute: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        matrices = self._matrices(attribute, weight)
        if attribute == "weight":
            named = {name: matrices}
        elif attribute == "down_proj":
            named = {f"{name}.{expert}.down_proj": one for expert, one in enumerate(matrices)}
        else:
            named = {
                f"{name}.{expert}.{part}": one
                for expert, both in enumerate(matrices)
                for part, one in zip(("gate_proj", "up_proj"), both, strict=True)
            }
        stored = {}
        for key, matrix in named.items():
            stored[f"{key}.weight"], stored[f"{key}.weight_scale_inv"] = encode_fp8(matrix)
        return stored

    def _matrices(self, attribute: str, weight: torch.Tensor) -> torch.Tensor:
        # transformers 5 fuses the experts: [experts, gate then up, inputs].
        return torch.unflatten(weight, 1, (2, -1)) if attribute == "gate_up_proj" else weight


class Mxfp4:
    """gpt-oss: the experts alone, all of a layer in one tensor, gate and up in turn."""

    def __init__(self) -> None:
        self.config: dict[str, Any] = {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        }

    def attributes(self, name: str, module: torch.nn.Module) -> tuple[str, ...]:
        return ("gate_up_proj", "down_proj") if name.endswith(".experts") else ()

    def rounded(self, attribute: str, weight: torch.Tensor) -> torch.Tensor:
        # The live model has [experts, inputs, outputs], the file outputs first.
        return decode_mxfp4(*encode_mxfp4(weight.mT)).mT.contiguous()

    def stored(self, name: str, attribute: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        blocks, scales = encode_mxfp4(weight.mT)
        return {f"{name}.{attribute}_blocks": blocks, f"{name}.{attribute}_scales": scales}


FORMATS: dict[str, type[Fp8Blocks] | type[Mxfp4]] = {"fp8": Fp8Blocks, "mxfp4": Mxfp4}


class _Rounded(torch.nn.Module):
    """The weight as it will be stored; its gradient goes straight through the rounding."""

    def __init__(self, form: StorageFormat, attribute: str) -> None:
        super().__init__()
        self.form, self.attribute = form, attribute

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        # The difference is exactly zero: the value is the rounded one to the last bit.
        return self.form.rounded(self.attribute, weight.detach()) + (weight - weight.detach())


def train_rounded(model: torch.nn.Module, form: StorageFormat) -> None:
    """From here on the model computes with rounded weights and its optimizer sees exact ones."""
    for _, module, attribute in _taken(model, form):
        parametrize.register_parametrization(module, attribute, _Rounded(form, attribute))


def keep_rounded(model: torch.nn.Module, form: StorageFormat) -> None:
    """End :func:`train_rounded`: the rounded weights become the model's own."""
    for _, module, attribute in _taken(model, form):
        parametrize.remove_parametrizations(module, attribute)


def _taken(
    model: torch.nn.Module, form: StorageFormat
) -> Iterator[tuple[str, torch.nn.Module, str]]:
    for name, module in list(model.named_modules()):
        for attribute in form.attributes(name, module):
            yield name, module, attribute


def stored_state(model: Any, form: StorageFormat) -> dict[str, torch.Tensor]:
    """The checkpoint of a float32 model: published names, parameters bfloat16 or in the format."""
    live = dict(model.state_dict())
    float32 = {name for name, _ in model.named_buffers()}
    taken = {f"{name}.{attribute}" for name, _, attribute in _taken(model, form)}
    layers = model.config.num_hidden_layers
    last = f"model.layers.{layers - 1}."
    for layer in range(layers, layers + getattr(model.config, "num_nextn_predict_layers", 0)):
        made_up = _prediction_layer(live, last, f"model.layers.{layer}.")
        live |= made_up
        twins = {name: name.replace(f".{layer}.", f".{layers - 1}.", 1) for name in made_up}
        taken |= {name for name, twin in twins.items() if twin in taken}
        float32 |= {name for name, twin in twins.items() if twin in float32}
    stored = {}
    for key, value in live.items():
        if key in taken:
            name, _, attribute = key.rpartition(".")
            stored.update(form.stored(name, attribute, value))
        else:
            stored[key] = value if key in float32 else value.to(torch.bfloat16)
    return {name: value.cpu().contiguous() for name, value in stored.items()}


def _prediction_layer(
    live: dict[str, torch.Tensor], last: str, prefix: str
) -> dict[str, torch.Tensor]:
    """A layer for multi-token prediction, as DeepSeek-V3 stores one behind the last.

    transformers and the heads leave it out, so small random numbers will do.
    """
    norm, embedding = live["model.norm.weight"], live["model.embed_tokens.weight"]
    like = {name.removeprefix(last): value for name, value in live.items() if last in name}
    like |= {f"{name}.weight": norm for name in ("enorm", "hnorm", "shared_head.norm")}
    like |= {f"{name}.weight": embedding for name in ("embed_tokens", "shared_head.head")}
    like["eh_proj.weight"] = norm.expand(2, len(norm), -1).permute(1, 0, 2).flatten(1)
    generator = torch.Generator().manual_seed(0)
    return {
        prefix + name: MTP_SCALE * torch.randn(value.shape, generator=generator)
        for name, value in like.items()
    }
