"""The seven published models on 64 ranks: their own names, full size, every tensor lands once."""

from __future__ import annotations

import time
from collections.abc import Iterator

import published_names
import pytest
import torch.distributed as dist

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from megatron.core import parallel_state

from autodeco.engines.megatron.plan import Request, plan_layout
from autodeco.family import FamilySpec
from autodeco.testing.maps import whole_names
from autodeco_plugin_deepseek_v3.family import FAMILY as DEEPSEEK_V3
from autodeco_plugin_gpt_oss.family import FAMILY as GPT_OSS
from autodeco_plugin_llama31.family import FAMILY as LLAMA31
from autodeco_plugin_qwen3.family import FAMILY as QWEN3
from autodeco_plugin_qwen25.family import FAMILY as QWEN25

RANKS = 64
SECONDS = 240
# family, preset, names, elements, dropped tensors
MODELS: tuple[tuple[FamilySpec, str, list[str], int, int], ...] = (
    (QWEN3, "30b-a3b", published_names.qwen3_moe(48, 128), 30_532_122_624, 0),
    (QWEN3, "235b-a22b", published_names.qwen3_moe(94, 128), 235_093_634_560, 0),
    (GPT_OSS, "20b", published_names.gpt_oss(24), 20_914_757_184, 0),
    (GPT_OSS, "120b", published_names.gpt_oss(36), 116_829_156_672, 0),
    (
        *(DEEPSEEK_V3, "v3.1-terminus", published_names.deepseek_v3(61, 3, 256)),
        *(671_026_419_200, 788),
    ),
    (LLAMA31, "nemotron-nano-8b", published_names.llama(32), 8_030_261_248, 0),
    (QWEN25, "7b", published_names.qwen25(28, tied=False), 7_615_616_512, 0),
)


@pytest.fixture(autouse=True)
def _no_groups() -> Iterator[None]:
    """A plan needs a process that is in no group; other tests leave one of one rank behind."""
    if dist.is_initialized():
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    yield
    assert not dist.is_initialized()


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model[1])
def test_every_tensor_lands_once_in_each_copy(
    model: tuple[FamilySpec, str, list[str], int, int],
) -> None:
    family, name, names, elements, dropped = model
    preset = family.preset(name)
    architecture = family.architecture(preset.architecture)
    begin = time.monotonic()
    request = Request(
        architecture=architecture,
        config=architecture.config_json(preset.shape, preset.config),
        bound=family.weight_map.bind(preset.shape, whole_names(names, family.formats)),
        gpus=RANKS,
        gpu_memory=80 << 30,
        reserve=0,
        micro_batch_tokens=16,
        max_length=16,
    )
    plan = plan_layout(request, preset.layout)
    landing = plan.landing
    assert landing is not None
    assert (landing.elements, landing.dropped) == (elements, dropped)
    assert sum(len(rank.ranks) for rank in plan.ranks) == RANKS
    assert time.monotonic() - begin < SECONDS
