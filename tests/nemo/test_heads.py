"""Heads come out of a checkpoint that NeMo 2 itself wrote (with_heads/), without NeMo.

Made by `tools/record_nemo_keys.py --spec local --heads tests/nemo/with_heads`: NeMo's Qwen3 model
and NeMo's save, the heads where the published training code has them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from autodeco.cli import main
from autodeco.heads.files import load_heads

CHECKPOINT = Path(__file__).with_name("with_heads")
SHAPES = {
    "temp_head.mlp.0.weight": (256, 16),
    "temp_head.mlp.0.bias": (256,),
    "temp_head.mlp.2.weight": (1, 256),
    "temp_head.mlp.2.bias": (1,),
    "top_p_head.mlp.0.weight": (256, 21),
    "top_p_head.mlp.0.bias": (256,),
    "top_p_head.mlp.2.weight": (1, 256),
    "top_p_head.mlp.2.bias": (1,),
}


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_heads_that_nemo_wrote_are_exported(tmp_path: Path) -> None:
    state = {f"module.adapter.{name}": torch.empty(shape) for name, shape in SHAPES.items()}
    dcp.load(state, storage_reader=dcp.FileSystemReader(CHECKPOINT / "weights"), no_dist=True)
    main(["export", "--input", str(CHECKPOINT), "--output", str(tmp_path / "heads")])
    heads = load_heads(tmp_path / "heads").heads.state_dict()
    assert heads.keys() == SHAPES.keys()
    for name, tensor in heads.items():
        assert torch.equal(tensor.float(), state[f"module.adapter.{name}"]), name
        assert tensor.any(), name
