"""The small checkpoints that NeMo was asked about; `python cases.py DIR` writes them."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from autodeco.convert.random_checkpoint import write_random_checkpoint
from autodeco.family import FamilySpec, ModelPreset
from autodeco_plugin_deepseek_v3.family import FAMILY as DEEPSEEK_V3
from autodeco_plugin_gpt_oss.family import FAMILY as GPT_OSS
from autodeco_plugin_llama31.family import FAMILY as LLAMA31
from autodeco_plugin_qwen3.family import FAMILY as QWEN3
from autodeco_plugin_qwen25.family import FAMILY as QWEN25

KEYS = Path(__file__).with_name("keys")


@dataclass(frozen=True)
class Case:
    """A preset of a family, its weights in bfloat16.

    Attributes:
        name: Of its files.
        of: The family.
        preset_name: The preset.
        plain: Nothing is stored in parts; NeMo reads no FP8, but MXFP4 it does.
    """

    name: str
    of: FamilySpec
    preset_name: str
    plain: bool = True

    @property
    def family(self) -> FamilySpec:
        """Returns the family, in which the checkpoint is stored as the case has it."""
        if not self.plain:
            return self.of
        plain = (
            dataclasses.replace(a, stored={k: v for k, v in a.stored.items() if v == "F32"})
            for a in self.of.architectures
        )
        return dataclasses.replace(self.of, architectures=tuple(plain))

    @property
    def preset(self) -> ModelPreset:
        """Returns the preset."""
        return self.family.preset(self.preset_name)

    def write(self, directory: Path) -> Path:
        """Writes the checkpoint, with a config that transformers 4 understands, too."""
        write_random_checkpoint(self.family, self.preset, directory, dtype=torch.bfloat16)
        path = directory / "config.json"
        config = json.loads(path.read_text())
        rope = config["rope_parameters"]
        config["rope_theta"] = rope["rope_theta"]
        if rope["rope_type"] != "default":
            config["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
        if self.plain:
            config.pop("quantization_config", None)
        path.write_text(json.dumps(config, indent=2))
        (directory / "generation_config.json").write_text("{}")
        path = directory / "tokenizer_config.json"
        tokenizer = json.loads(path.read_text())
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 4 knows no other
        tokenizer.pop("extra_special_tokens", None)
        path.write_text(json.dumps(tokenizer, indent=2))
        return directory


CASES = {
    case.name: case
    for case in (
        Case("llama31", LLAMA31, "debug"),
        Case("qwen25", QWEN25, "debug"),
        Case("qwen3", QWEN3, "debug"),
        Case("qwen3-moe", QWEN3, "debug-moe"),
        Case("deepseek_v3", DEEPSEEK_V3, "debug"),
        Case("gpt_oss", GPT_OSS, "debug", plain=False),
    )
}


def main() -> None:
    for case in CASES.values():
        case.write(Path(sys.argv[1], case.name))


if __name__ == "__main__":
    main()
