"""Rotary positions, applied inside the core attention: any positions, in any order, one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autodeco.errors import WeightsError

#: Kinds of transformers' whose frequencies depend on the length of the sequence.
REFUSED = ("dynamic", "longrope")


@dataclass(frozen=True)
class Rotary:
    """The angles of a model's rotary embedding.

    Attributes:
        frequencies: float32 [width / 2], radians a position.
        scale: What cosines and sines are multiplied by (yarn's attention factor).
    """

    frequencies: Tensor
    scale: float

    def angles(self, positions: Tensor) -> Tensor:
        """Returns float32 [s, 1, 1, width / 2] of positions int64 [s]."""
        return positions.to(torch.float32).outer(self.frequencies)[:, None, None]

    def tables(
        self, positions: Tensor, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines of positions int64 [s], each [s, 1, 1, width / 2]."""
        angles = self.angles(positions)
        cos, sin = angles.cos() * self.scale, angles.sin() * self.scale
        return cos.to(device, dtype), sin.to(device, dtype)


class MicrobatchRotary(nn.Module):
    """Gives latent attention, which rotates itself, the angles of the microbatch in hand.

    Attributes:
        angles: float32 [s, 1, 1, width / 2]; the engine sets them.
        scale: See `Rotary.scale`.
    """

    angles: Tensor | None = None
    scale: float = 1.0

    def get_rotary_seq_len(self, *_: Any) -> int:
        """Returns what megatron-core passes on to `forward`."""
        return 0

    def forward(self, *_: Any, **__: Any) -> tuple[Tensor, float]:
        """Returns the angles [s, 1, 1, width] and the factor of cosines and sines."""
        assert self.angles is not None, "the engine announces every microbatch"
        return torch.cat((self.angles, self.angles), dim=-1), self.scale


def rope_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a ``config.json`` says of its rotary embedding, where it says it."""
    return {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}


def rotary_of(config: Mapping[str, Any], where: str, width: int | None = None) -> Rotary:
    """Reads a checkpoint's rotary embedding; scaled frequencies are those of transformers.

    Args:
        config: Its ``config.json``.
        where: For messages.
        width: What rotates of a head, where it is not the usual share of it.

    Raises:
        WeightsError: A value is missing or wrong, or its kind is one of `REFUSED` or unknown to
            transformers.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = rope_values(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        raise WeightsError(
            "the config gives no rope_theta",
            where=where,
            fix="take config.json from where the weights are from",
        )
    if kind in REFUSED or kind not in ("default", *ROPE_INIT_FUNCTIONS):
        raise WeightsError(
            f"rotary embedding of type {kind!r} is not done by the megatron engine",
            where=where,
            fix="use --engine hf",
        )
    if kind != "default":
        return _scaled(config, kind, where)
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    width = (
        width or config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    )
    exponent = torch.arange(0, int(width * share), 2, device="cpu", dtype=torch.float32)
    return Rotary(1.0 / float(theta) ** (exponent / int(width * share)), 1.0)


def _scaled(config: Mapping[str, Any], kind: str, where: str) -> Rotary:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    values = {k: v for k, v in config.items() if k not in ("architectures", "model_type")}
    try:
        full = AutoConfig.for_model(config["model_type"], **values)
        with torch.device("cpu"):  # a plan's default device is the meta device
            frequencies, scale = ROPE_INIT_FUNCTIONS[kind](full, torch.device("cpu"))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise WeightsError(
            f"the values of the {kind} rotary embedding do not do: {error!r}",
            where=where,
            fix="take config.json from where the weights are from",
        ) from error
    return Rotary(frequencies.float(), float(scale))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (i, i + width / 2) of each head; what lies behind them stays.

    Args:
        x: [s, b, heads, at least width].
        cos, sin: [s, 1, 1, width / 2].
    """
    half = cos.shape[-1]
    out = torch.empty_like(x)
    first, second = x[..., :half], x[..., half : 2 * half]
    # four passes; the usual x * cos + rotate_half(x) * sin takes about twice as many
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin)
    if x.shape[-1] > 2 * half:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out
