"""What is encoded comes back to half a step; a format's fields fit each other."""

import torch
from autodeco_plugin_int8_rows.family import INT8_ROWS
from autodeco_plugin_int8_rows.format import decode, encode


def test_a_weight_is_off_by_half_a_step_at_most() -> None:
    value = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    value[2] = 0.0
    parts = encode(value)
    step = value.abs().amax(1, keepdim=True) / 127
    assert ((decode(parts) - value).abs() <= step / 2 * (1 + 1e-5)).all()
    assert torch.equal(decode(encode(decode(parts))), decode(parts))
    assert INT8_ROWS.shape({name: tuple(part.shape) for name, part in parts.items()}) == (5, 40)
