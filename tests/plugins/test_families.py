"""The shipped families keep the contract; the checks are those of `autodeco plugin check`."""

from __future__ import annotations

import published_names
import pytest

from autodeco.testing import FamilyContract

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

COSTLY = {"ranks": pytest.mark.slow, "landing": pytest.mark.slow}


QWEN3 = {
    "30b-a3b": published_names.qwen3_moe(48, 128),
    "235b-a22b": published_names.qwen3_moe(94, 128),
}
QWEN25 = {
    "7b": published_names.qwen25(28, tied=False),
    "0.5b": published_names.qwen25(24, tied=True),
}
LLAMA31 = {"nemotron-nano-8b": published_names.llama(32), "70b": published_names.llama(80)}
GPT_OSS = {"20b": published_names.gpt_oss(24), "120b": published_names.gpt_oss(36)}
DEEPSEEK_V3 = {"v3.1-terminus": published_names.deepseek_v3(61, 3, 256)}


class TestQwen3(FamilyContract):
    plugin = "qwen3"
    index = QWEN3
    marks = COSTLY


class TestQwen25(FamilyContract):
    plugin = "qwen25"
    index = QWEN25
    marks = COSTLY


class TestLlama31(FamilyContract):
    plugin = "llama31"
    index = LLAMA31
    marks = COSTLY


class TestGptOss(FamilyContract):
    plugin = "gpt_oss"
    index = GPT_OSS
    marks = COSTLY


class TestDeepSeekV3(FamilyContract):
    plugin = "deepseek_v3"
    index = DEEPSEEK_V3
    marks = COSTLY
