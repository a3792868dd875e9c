"""Recipes that presets share: values of a training run, by the names of `Job`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

#: Heads of a real model: length, batch and epochs of the published runs, our own learning rate.
TRAINING: Mapping[str, Any] = MappingProxyType(
    {
        "max_length": 6144,
        "global_batch": 32,
        "epochs": 1,
        "learning_rate": 1e-3,
        "min_learning_rate": 1e-5,
        "warmup_steps": 20,
        "constant_steps": 50,
    }
)
#: Heads of a built-in tiny model on the built-in stories.
DEMO: Mapping[str, Any] = MappingProxyType(
    {
        "max_length": 256,
        "global_batch": 64,
        "learning_rate": 2e-3,
        "min_learning_rate": 2e-5,
        "epochs": 2,
        "save_every": 50,
        "eval_every": 25,
        "max_new_tokens": 110,
        "problem_format": "text",
    }
)
#: A few steps of a tiny random model: does everything fit together?
DEBUG: Mapping[str, Any] = MappingProxyType(
    {**DEMO, "max_steps": 4, "global_batch": 8, "max_new_tokens": 24}
)
