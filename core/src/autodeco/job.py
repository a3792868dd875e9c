"""`Job`: everything that a run needs, frozen.

One declaration serves the command line (an option a field), the configuration file (a key a field),
``--dry-run`` (where each value came from), ``job.json`` and the job's hash.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

AUTO = "auto"
_LARGEST_SEED = 2**63 - 1


def _option(
    default: Any,
    help: str,
    *,
    section: str,
    result: bool = False,
    choices: tuple[str, ...] = (),
    flag: str | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """Declares a field: help, section, whether it changes the trained heads, and its bounds.

    `low` and `high` belong to the range, `above` and `below` do not.
    """
    metadata = {
        "help": help,
        "section": section,
        "result": result,
        "choices": choices,
        "flag": flag,
        "bounds": {"low": low, "high": high, "above": above, "below": below},
    }
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Job:
    """The resolved options of a run; each field's help says what it is.

    `result` in a field's metadata marks what changes the trained heads: those fields make up the
    job's hash, and a run that was begun with other values is not continued without
    ``--allow-change``.
    """

    plugin: str | None = _option(None, "Plugin: a family's id or alias.", section="model")
    preset: str | None = _option(
        None,
        "Preset of the family: one size with its recipe; auto: the sizes of --model.",
        section="model",
        result=True,
    )
    model: Path | None = _option(
        None, "Hugging Face checkpoint directory; default: the built-in model.", section="model"
    )
    engine: str = _option(
        AUTO,
        "What executes the backbone; auto: megatron where the layout splits the model, else hf.",
        section="model",
        choices=(AUTO, "hf", "megatron"),
    )
    layout: str | None = _option(
        None,
        "How the model is spread, as tp=2,pp=2,ep=1 (first=, last=: layers of these stages); "
        "default: the preset's; of --preset auto: the best that fits the memory.",
        section="model",
    )
    device: str = _option(AUTO, "cpu, cuda or cuda:N.", section="model")
    dtype: str = _option(
        AUTO,
        "Dtype of the backbone; auto: as stored (float32 on CPU).",
        section="model",
        choices=(AUTO, "float32", "bfloat16", "float16"),
        result=True,
    )
    import_format: str = _option(
        "hf",
        "hf: the engine reads the checkpoint itself; torch_dist: it is first written as a "
        "megatron-core checkpoint.",
        section="model",
        choices=("hf", "torch_dist"),
    )
    import_dir: Path | None = _option(
        None,
        "Where the imported checkpoint is, or will be; default: in the run directory.",
        section="model",
    )
    trust_remote_code: bool = _option(
        False, "Run model code that comes with the checkpoint.", section="model"
    )

    data: Path | None = _option(
        None, "Training data, JSONL; default: the built-in task.", section="data"
    )
    task_samples: int = _option(
        4096, "Training samples drawn from the built-in task.", section="data", result=True, low=1
    )
    eval_data: Path | None = _option(
        None, "Held-out data, JSONL; default: a split of --data.", section="data"
    )
    held_out: float = _option(
        0.02,
        "Share of --data held out when there is no --eval-data.",
        section="data",
        result=True,
        above=0,
        below=1,
    )
    held_out_most: int = _option(
        128, "At most this many samples are held out.", section="data", result=True, low=1
    )
    max_length: int = _option(
        6144, "Longer samples (tokens) are dropped and counted.", section="data", result=True, low=2
    )
    chat_template_kwargs: dict[str, Any] = _option(
        {}, "JSON passed to the chat template.", section="data", result=True
    )
    eos_loss: bool = _option(
        True,
        "The end-of-turn token is in the loss.",
        section="data",
        result=True,
        flag="--eos-loss/--no-eos-loss",
    )

    heads: str = _option(
        "both",
        "Which heads to train.",
        section="heads",
        choices=("both", "temperature", "top-p"),
        result=True,
    )
    enhanced_features: bool = _option(
        True,
        "The top-p head reads four features of the distribution.",
        section="heads",
        result=True,
        flag="--enhanced-features/--no-enhanced-features",
    )
    init_heads: Path | None = _option(
        None, "Start from these heads (directory or file).", section="heads"
    )
    save_dtype: str = _option(
        "float32",
        "Dtype of the saved heads.",
        section="heads",
        choices=("float32", "bfloat16", "float16"),
    )

    objective: str = _option(
        "nll",
        "Training objective: nll (ours, unweighted, exact logs), or one of the published three: "
        "megatron, hf, paper.",
        section="train",
        choices=("nll", "megatron", "hf", "paper"),
        result=True,
    )
    drop: float | None = _option(
        None,
        "Share of correctly predicted tokens that is dropped; default: the objective's own.",
        section="train",
        result=True,
        low=0,
        high=1,
    )
    recipe: str = _option(
        "default",
        "published: the published objective and schedule.",
        section="train",
        choices=("default", "published"),
        result=True,
    )
    learning_rate: float = _option(
        1e-3, "Peak learning rate.", section="train", result=True, above=0
    )
    min_learning_rate: float = _option(
        1e-5, "Learning rate of the constant tail.", section="train", result=True, low=0
    )
    warmup_steps: int = _option(
        20, "Linear warm-up; half of the run at most.", section="train", result=True, low=0
    )
    constant_steps: int = _option(
        0,
        "Steps at the minimum, at the end; a quarter of the run at most.",
        section="train",
        result=True,
        low=0,
    )
    weight_decay: float = _option(0.0, "AdamW weight decay.", section="train", result=True, low=0)
    clip: float = _option(
        1.0, "Gradient norm is clipped to this.", section="train", result=True, above=0
    )
    global_batch: int = _option(32, "Samples a step.", section="train", result=True, low=1)
    micro_batch_tokens: int = _option(
        16384, "Tokens that go through the backbone at once.", section="train", low=1
    )
    packing: bool = _option(
        True,
        "Sequences are laid end to end where the engine can (megatron, cp=1), else padded.",
        section="train",
        flag="--packing/--no-packing",
    )
    epochs: int = _option(1, "Passes over the data.", section="train", result=True, low=1)
    max_steps: int | None = _option(
        None, "Stop after this many.", section="train", result=True, low=1
    )
    seed: int = _option(
        0, "Seed of every random draw.", section="train", result=True, low=0, high=_LARGEST_SEED
    )
    save_every: int = _option(100, "Steps between checkpoints.", section="train", low=1)
    keep: int = _option(2, "Newest checkpoints kept, beside the best.", section="train", low=1)
    eval_every: int = _option(50, "Steps between held-out measurements.", section="train", low=1)
    track: str = _option(
        "none",
        "Metrics also go to this tracker.",
        section="train",
        choices=("none", "tensorboard", "wandb"),
    )
    log_seconds: float = _option(
        10.0, "Without a terminal, one progress line every N seconds.", section="train", low=0
    )

    out: Path = _option(Path("runs"), "Directory of all runs.", section="run")
    name: str | None = _option(None, "Name of the run; default: plugin-preset.", section="run")
    resume: str = _option(
        AUTO,
        "auto: continue the newest unfinished run of this name and job; new; or a run's path.",
        section="run",
    )
    allow_change: str = _option(
        "", "Fields, by comma, that may differ from the resumed run's.", section="run"
    )

    time_limit: str | None = _option(
        None,
        "End with a checkpoint before this has passed since the start: 3h50m, 90m, or seconds.",
        section="run",
    )
    dist_timeout: float = _option(
        600.0,
        "Seconds after which a rank that is silent, or that the others wait for, ends the run.",
        section="run",
        low=1,
    )

    checkpoint: str = _option("best", "Checkpoint to export: best, last or a step.", section="out")
    temperature_scale: float = _option(
        1.0, "The dial's default, stored with the exported heads.", section="out", above=0
    )
    top_p_scale: float = _option(
        1.0, "The dial's default, stored with the exported heads.", section="out", above=0
    )
    merge: str = _option(
        "native",
        "Layout of the merged checkpoint.",
        section="out",
        choices=("native", "autodeco", "none"),
    )
    copy: bool = _option(
        False,
        "Copy the base's weights instead of linking them: needed across filesystems.",
        section="out",
    )
    problems: Path | None = _option(
        None, "Problems to evaluate on, JSONL of problem and gt.", section="evaluate"
    )
    problem_format: str = _option(
        AUTO,
        "text: a problem is already formatted; chat: it is a user's message for the chat template;"
        " auto: chat where there is a template, unless a problem spells out a special token.",
        section="evaluate",
        choices=(AUTO, "text", "chat"),
    )
    answer_check: str = _option(
        AUTO,
        "How answers are compared with gt: auto (exact numbers, else text) or math-verify.",
        section="evaluate",
        choices=(AUTO, "math-verify"),
    )
    evaluate_problems: int = _option(256, "At most this many problems.", section="evaluate", low=1)
    evaluate_samples: int = _option(1, "Answers a problem and setting.", section="evaluate", low=1)
    evaluate_rows: int | None = _option(
        None, "Answers decoded at once; default: what fits in memory.", section="evaluate", low=1
    )
    max_new_tokens: int = _option(2048, "Longest answer.", section="evaluate", low=1)
    evaluate_seed: int = _option(
        1234, "Seed of the sampling.", section="evaluate", low=0, high=_LARGEST_SEED
    )

    def replace(self, **changes: Any) -> Job:
        """Returns a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON-serialisable mapping, itself a valid ``--config``."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}

    def result_values(self) -> dict[str, Any]:
        """Returns the fields that change the trained heads, as JSON values."""
        values = self.to_json()
        return {i.name: values[i.name] for i in dataclasses.fields(self) if i.metadata["result"]}

    def digest(self, inputs: Mapping[str, str]) -> str:
        """Returns the job's hash.

        Args:
            inputs: Digests of what the job reads (model, data, eval_data, plugin).
        """
        text = json.dumps([self.result_values(), dict(sorted(inputs.items()))], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
