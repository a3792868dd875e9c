"""Decoding with the heads; importing this package registers it with transformers."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from autodeco.decoding.config import AutoDecoConfig
from autodeco.decoding.model import AutoDecoModelForCausalLM, attach
from autodeco.decoding.policy import DecodingPolicy

__all__ = ["AutoDecoConfig", "AutoDecoModelForCausalLM", "DecodingPolicy", "attach"]

AutoConfig.register(AutoDecoConfig.model_type, AutoDecoConfig, exist_ok=True)
AutoModelForCausalLM.register(AutoDecoConfig, AutoDecoModelForCausalLM, exist_ok=True)
