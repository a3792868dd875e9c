"""Storage formats: how a checkpoint may keep a tensor as several smaller ones (FP8, MXFP4).

A format is data. It says which stored tensors make up one tensor of the model, how their elements
lie in it, and names the function that decodes them. Weight maps see the tensors of the model alone;
whoever reads a checkpoint decodes on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Dims = tuple[int, ...]


@dataclass(frozen=True)
class Axis:
    """One dimension of a stored part.

    Attributes:
        dim: The dimension of the model's tensor that it runs along.
        grain: Elements of that dimension that one element of the part stands for.
    """

    dim: int
    grain: int = 1


@dataclass(frozen=True)
class Part:
    """One of the stored tensors that make up a tensor of the model.

    Attributes:
        suffix: What its name adds to the tensor's.
        dtypes: safetensors' names of the dtypes that it may have.
        axes: For each of its dimensions where it runs; None: a dimension of its own, read whole.
            Empty: as many as the main part has, dimension by dimension.
    """

    suffix: str
    dtypes: tuple[str, ...]
    axes: tuple[Axis | None, ...] = ()


@dataclass(frozen=True)
class StorageFormat:
    """A way of storing a tensor in parts.

    Attributes:
        name: For messages, and for `Architecture.stored`.
        parts: Part -> what it is; the first is the main one, by which a stored tensor is known.
        decode: ``module:function`` that takes ``{part: Tensor}``, cut along the axes' grains, and
            returns the float32 tensor that they make up.
        encode: ``module:function`` that takes a float32 tensor and returns ``{part: Tensor}``; for
            random checkpoints.
        decode_bfloat16: A faster way, on the CPU, to what `decode` gives, rounded once to
            bfloat16; for conversions. Empty: there is none.
    """

    name: str
    parts: Mapping[str, Part]
    decode: str
    encode: str
    decode_bfloat16: str = ""

    @property
    def main(self) -> Part:
        """Returns the part by which a stored tensor is known."""
        return next(iter(self.parts.values()))

    def shape(self, shapes: Mapping[str, Dims]) -> Dims:
        """Returns the tensor's shape from those of its stored parts.

        Raises:
            ValueError: They do not fit each other; the text says which.
        """
        for part, found in shapes.items():
            if len(self.axes(part, len(found))) != len(found):
                expected = len(self.axes(part, len(found)))
                raise ValueError(f"{part} has {len(found)} dimensions, expected {expected}")
        main, *others = self.parts
        sizes: dict[int, int] = {}
        for size, axis in zip(shapes[main], self.axes(main, len(shapes[main])), strict=True):
            if axis is not None:
                sizes[axis.dim] = size * axis.grain
        whole = tuple(sizes[dim] for dim in sorted(sizes))
        for part in others:
            found = shapes[part]
            axes = self.axes(part, len(found))
            fitting = tuple(
                size if axis is None else -(-whole[axis.dim] // axis.grain)
                for size, axis in zip(found, axes, strict=True)
            )
            if fitting != found:
                raise ValueError(f"{part} has the shape {found}, expected {fitting}")
        return whole

    def axes(self, part: str, dims: int) -> tuple[Axis | None, ...]:
        """Returns the axes of a part with this many dimensions."""
        return self.parts[part].axes or tuple(Axis(dim) for dim in range(dims))


FP8_BLOCKS = StorageFormat(
    name="fp8_blocks",
    parts={
        "weight": Part("", ("F8_E4M3",), (Axis(0), Axis(1))),
        "scale": Part("_scale_inv", ("F32", "BF16", "F8_E8M0"), (Axis(0, 128), Axis(1, 128))),
    },
    decode="autodeco.convert.formats:decode_fp8_blocks",
    encode="autodeco.convert.formats:encode_fp8_blocks",
    decode_bfloat16="autodeco.convert.rounding:round_fp8_blocks",
)
# Experts first, then inputs, then outputs, as the tensor is in the model; the blocks lie along the
# inputs, two values a byte.
MXFP4 = StorageFormat(
    name="mxfp4",
    parts={
        "blocks": Part("_blocks", ("U8",), (Axis(0), Axis(2), Axis(1, 32), None)),
        "scales": Part("_scales", ("U8", "F8_E8M0"), (Axis(0), Axis(2), Axis(1, 32))),
    },
    decode="autodeco.convert.formats:decode_mxfp4",
    encode="autodeco.convert.formats:encode_mxfp4",
    decode_bfloat16="autodeco.convert.rounding:round_mxfp4",
)
BUILT_IN = (FP8_BLOCKS, MXFP4)
