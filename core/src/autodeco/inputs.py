"""What a job reads: its checkpoint, tokenizer, data and problems, the built-in ones included."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from autodeco import stories
from autodeco.errors import PluginError
from autodeco.files import read_object
from autodeco.job import Job
from autodeco.registry import Resolution

_TASK_SEED = 20251
_HELD_OUT = 256
_SAMPLED_TENSORS, _SAMPLED_BYTES = 512, 256


@dataclass(frozen=True)
class Inputs:
    """The resolved inputs of a run.

    Attributes:
        job: The job with every path filled in.
        model_name: For checkpoint names.
        problems: JSONL of problems, or None.
    """

    job: Job
    model_name: str
    problems: Path | None

    @staticmethod
    def digests(job: Job, resolution: Resolution) -> dict[str, str]:
        """Returns digests of all inputs, for the job's hash.

        A checkpoint is identified by its configuration, tokenizer and template, its tensors' names,
        dtypes and shapes, its files' sizes, and some bytes out of the middle of up to 512 tensors:
        hashing terabytes at every start would cost more than it protects from.

        What can be told from the inputs alone is checked here, before a run begins.

        Raises:
            DataError, WeightsError: An input is missing or unreadable.
            PluginError: The preset has no built-in model or task, and none was given.
        """
        from autodeco.convert.source import require_built_in
        from autodeco.training.data import file_digest

        digests = {"plugin": f"{resolution.row.dist}=={resolution.row.version}"}
        if job.model is None:
            require_built_in(resolution.family, resolution.preset)
            digests["model"] = f"built-in {resolution.preset.name}"
        else:
            digests["model"] = _model_digest(job.model)
        if job.data is not None:
            digests["data"] = file_digest(job.data)
        else:
            digests["data"] = f"built-in {_require_task(resolution)}"
        if job.eval_data is not None:
            digests["eval_data"] = file_digest(job.eval_data)
        if job.init_heads is not None:
            digests["init_heads"] = _heads_digest(job.init_heads)
        _check_what_comes_late(job)
        return digests

    def tokenizer(self) -> Any:
        """Loads the checkpoint's tokenizer.

        Raises:
            DataError: There is none, or it cannot be loaded.
        """
        from autodeco.training.tokenization import load_tokenizer

        assert self.job.model is not None
        return load_tokenizer(self.job.model, trust_remote_code=self.job.trust_remote_code)

    def load_training_data(self, vocab_size: int, console: Console) -> tuple[Any, Any]:
        """Loads the training samples and the held-out samples.

        Args:
            vocab_size: Rows of the output layer; larger token ids are an error.
            console: What was dropped is said here.

        Raises:
            DataError: See `autodeco.training.data.load_samples`.
        """
        from autodeco.training.data import load_samples, split_held_out
        from autodeco.training.tokenization import eos_token_ids

        job, tokenizer = self.job, self.tokenizer()
        assert job.data is not None and job.model is not None
        eos = eos_token_ids(job.model, tokenizer)

        def load(path: Path) -> Any:
            loaded = load_samples(
                path,
                tokenizer,
                vocab_size=vocab_size,
                max_length=job.max_length,
                chat_template_kwargs=job.chat_template_kwargs,
                eos_loss=job.eos_loss,
                eos_token_ids=eos,
            )
            tokens = sum(int(sample.predict.sum()) for sample in loaded.samples)
            console.print(
                f"  {escape(str(path))}: {len(loaded.samples):,} samples, "
                f"{tokens:,} tokens to learn from",
                highlight=False,
            )
            for reason, count in loaded.dropped.items():
                console.print(f"  [yellow]{count} samples dropped: {reason}[/]", highlight=False)
            if loaded.skipped_turns:
                console.print(
                    f"  [yellow]{loaded.skipped_turns} earlier assistant turns are context only: "
                    "the chat template rewrites them once the chat goes on[/]",
                    highlight=False,
                )
            return loaded

        train = load(job.data)
        if job.eval_data is not None:
            return train, load(job.eval_data)
        train, held_out = split_held_out(train, job.held_out, job.seed, job.held_out_most)
        console.print(f"  {len(held_out.samples)} of them are held out", highlight=False)
        return train, held_out


def prepare_inputs(job: Job, resolution: Resolution, directory: Path) -> Inputs:
    """Fills in the built-in model, data and problems where the job gives none.

    Args:
        job: With plugin, preset and name set.
        resolution: Its plugin and preset.
        directory: The run directory; built-in data is written below it.

    Raises:
        PluginError: The preset has no built-in model or task, and none was given.
        EnvironmentProblem: The data cannot be written.
    """
    from autodeco.convert.source import built_in_checkpoint

    family, preset = resolution.family, resolution.preset
    model_name = job.model.resolve().name if job.model else f"{family.id}-{preset.name}"
    if job.model is None:
        model = built_in_checkpoint(family, preset, directory / "model")
        job = job.replace(model=model)
    if job.import_format != "hf" and job.import_dir is None:
        job = job.replace(import_dir=directory / "imported")
    problems = job.problems
    if job.data is None:
        _require_task(resolution)
        job, problems = _built_in_data(job, directory / "data")
    return Inputs(job, model_name, problems)


def require_merge(job: Job, place: Path, *, begun: bool) -> None:
    """Checks before the training that what is merged after it can be.

    Args:
        job: As it was given: a built-in model is copied where it cannot be linked.
        place: Where the run is, or will be.
        begun: The run is there, and has not merged yet: is there room for what it will write?

    Raises:
        EnvironmentProblem: The weights cannot be linked there and --copy was not given, or there
            is no room for them.
    """
    from autodeco.heads.places import require_ways

    linked = job.merge == "native" and not job.copy
    if job.model is not None and job.merge != "none" and (linked or begun):
        require_ways(job.model, place / "merged", job.merge, copy=job.copy)


def _require_task(resolution: Resolution) -> str:
    if resolution.preset.task != "stories":
        raise PluginError(
            f"preset {resolution.preset.name!r} has no built-in task",
            who=resolution.family.id,
            fix="add --data FILE with your training data (JSONL)",
        )
    return resolution.preset.task


def _built_in_data(job: Job, directory: Path) -> tuple[Job, Path]:
    """Writes what is missing of the stories; each file appears in one step."""
    data, held_out = directory / "train.jsonl", directory / "held_out.jsonl"
    problems = directory / "problems.jsonl"
    if not data.exists():
        stories.write_records(data, _TASK_SEED, "train", job.task_samples)
    if not held_out.exists():
        stories.write_records(held_out, _TASK_SEED, "heldout", _HELD_OUT)
    if not problems.exists() or _lines(problems) != job.evaluate_problems:
        stories.write_problems(problems, _TASK_SEED, count=job.evaluate_problems)
    return job.replace(data=data, eval_data=job.eval_data or held_out), job.problems or problems


def _check_what_comes_late(job: Job) -> None:
    """Finds before a run begins what would end it hours later.

    Raises:
        DataError: The problems cannot be used.
        EnvironmentProblem: The tracker's or the answer checker's package is not installed.
    """
    from autodeco.decoding.answers import require_method
    from autodeco.training.logging import require_tracker

    if job.problems is not None:
        from autodeco.decoding.problems import load_problems

        load_problems(job.problems, limit=job.evaluate_problems)
    require_method(job.answer_check)
    require_tracker(job.track)


def _heads_digest(path: Path) -> str:
    """A digest of the numbers of heads to start from.

    Raises:
        WeightsError: They cannot be read.
    """
    from autodeco.heads.files import load_heads

    digest = hashlib.sha256()
    for name, tensor in sorted(load_heads(path).heads.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def _lines(path: Path) -> int:
    with path.open("rb") as stream:
        return sum(1 for _ in stream)


def _model_digest(model: Path) -> str:
    from autodeco.safetensors_header import read_checkpoint
    from autodeco.training.data import file_digest

    digest = hashlib.sha256()
    read_object(model / "config.json")
    # The end-of-turn tokens and the template decide what is learned from.
    for pattern in ("config.json", "generation_config.json", "token*", "special_tokens*", "chat_*"):
        for file in sorted(p for p in model.glob(pattern) if p.is_file()):
            digest.update(f"{file.name} {file_digest(file)}\n".encode())
    infos = read_checkpoint(model)
    for info in sorted(infos.values(), key=lambda i: (i.file.name, i.start))[
        :: max(1, len(infos) // _SAMPLED_TENSORS)
    ]:
        with info.file.open("rb") as stream:
            stream.seek(info.start + info.size // 2)
            digest.update(stream.read(min(_SAMPLED_BYTES, info.size - info.size // 2)))
    for name, info in sorted(infos.items()):
        digest.update(f"{name} {info.dtype} {info.shape} {info.file.name}\n".encode())
    for file in sorted({info.file for info in infos.values()}):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]
