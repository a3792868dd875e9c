"""Tiny random checkpoints and heads for the tests of files and decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from autodeco.heads.files import save_heads
from autodeco.heads.identity import base_identity
from autodeco.heads.modules import DecodingHeads, HeadsConfig

VOCABULARY = 97
HIDDEN = 32


def tiny_model(family: str = "qwen3", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model with logits that are spread enough for a nucleus to mean something."""
    import transformers

    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "initializer_range": 0.3,
        "eos_token_id": None,
        "pad_token_id": 0,
        **changes,
    }
    configs = {
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    }
    config, model = configs[family]
    if family == "qwen3_moe":
        shape |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    torch.manual_seed(7)
    return model(config(**shape)).to(dtype).eval()


def save_tiny(
    model: Any, path: Path, shard: str = "5GB", vendor: dict[str, Any] | None = None
) -> Path:
    """Saves it as a vendor would: a generation_config with values, a tokenizer's file."""
    for key, value in (vendor or {}).items():
        setattr(model.generation_config, key, value)
    model.save_pretrained(path, max_shard_size=shard)
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return path


def tiny_heads(heads: str = "both", enhanced: bool = True, spread: float = 4.0) -> DecodingHeads:
    """Random heads whose T and P vary visibly from token to token."""
    generator = torch.Generator().manual_seed(3)
    made = DecodingHeads(HeadsConfig(HIDDEN, heads, enhanced), generator)
    with torch.no_grad():
        for head in (made.temp_head, made.top_p_head):
            if head is not None:
                head.mlp[2].weight.mul_(spread)
    return made


def save_tiny_heads(path: Path, base: Path | None = None, **options: Any) -> Path:
    dtype = options.pop("dtype", "float32")
    metadata = {"objective": "nll", **(base_identity(base) if base else {})}
    return save_heads(path, tiny_heads(**options), metadata=metadata, dtype=dtype)
