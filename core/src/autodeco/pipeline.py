"""The stages of a run, in order, each done once: a killed run goes on where it stopped."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape

from autodeco.cluster.environment import forwarded_variables
from autodeco.cluster.join import Cluster, joined
from autodeco.cluster.log import rank_log
from autodeco.errors import AutodecoError, UsageError
from autodeco.files import read_object, remove
from autodeco.hookspecs import BuiltModel, HeadedModel, ImportedWeights
from autodeco.inputs import Inputs, prepare_inputs, require_merge
from autodeco.job import Job
from autodeco.lock import run_lock
from autodeco.processes import rank, world_size
from autodeco.registry import Registry, Resolution
from autodeco.run_directory import STAGE_OPTIONS, STAGES, RunDirectory, open_run, record_job
from autodeco.run_summary import RunSummary
from autodeco.stopping import StopWatch, end_early
from autodeco.support import announce

_AFTER_TRAINING = frozenset({"export", "merge", "evaluate"})
_NEEDS_MODEL = frozenset({"build", "attach", "train", "evaluate"})


@dataclass
class _State:
    """What the stages hand on in memory; everything in it can be made again from the files."""

    weights: ImportedWeights | None = None
    model: BuiltModel | None = None
    headed: HeadedModel | None = None
    rows: list[tuple[str, str, float]] = field(default_factory=list)
    evaluation: Any = None


def run_job(
    job: Job,
    *,
    registry: Registry,
    stages: Sequence[str] | None = None,
    console: Console | None = None,
    resolution: Resolution | None = None,
) -> RunSummary:
    """Runs the stages of a job, skipping those that are done.

    Args:
        job: The job; plugin and preset may still be open.
        registry: Where the plugin is found.
        stages: Which of `STAGES`; all by default. Stages after the training, asked for without
            it, are done again in the newest trained run of this job.
        console: Where progress goes.
        resolution: The plugin and preset, where they were found already.

    Returns:
        What was done, on rank 0; on the others an empty summary.

    Raises:
        AutodecoError: Something that the user can cure; nothing that was done is lost.
    """
    from autodeco.engines.fitting import fitting_layout, is_to_be_fitted
    from autodeco.engines.select import choose_engine

    console = console or Console(stderr=True)
    wanted = tuple(stages or STAGES)
    for stage in wanted:
        if stage not in STAGES:
            raise UsageError(f"no stage {stage!r}", fix="choose from " + ", ".join(STAGES))
    resolution = resolution or registry.resolve(job.plugin, job.model, job.preset)
    family, preset = resolution.family, resolution.preset
    spread = job
    if is_to_be_fitted(job, preset, world_size()):
        spread = job.replace(layout=str(fitting_layout(job, family, preset, world_size())))
    # an impossible layout ends here
    choose_engine(spread, preset, world_size(), family.architecture(preset.architecture))
    job = job.replace(
        plugin=family.id, preset=preset.name, name=job.name or f"{family.id}-{preset.name}"
    )
    with joined(job) as cluster:
        return _Run(job, resolution, console, wanted, cluster, spread.layout).execute()


class _Run:
    """One call of `run_job`."""

    def __init__(
        self,
        job: Job,
        resolution: Resolution,
        console: Console,
        wanted: Sequence[str],
        cluster: Cluster,
        layout: str | None,
    ) -> None:
        self.cluster = cluster
        self.layout = layout
        self.resolution = resolution
        self.hooks = resolution.hooks()
        self.console = console
        self.wanted = wanted
        self.again = _AFTER_TRAINING.issuperset(wanted)
        self.state = _State()
        self.inputs: Inputs
        self.job, self.asked_layout, self.built_in = job, job.layout, job.model is None

    def execute(self) -> RunSummary:
        """Opens the run directory under its lock and goes through the stages."""
        cluster, first = self.cluster, rank() == 0
        digests = cluster.together(lambda: Inputs.digests(self.job, self.resolution))
        merges = first and "merge" in self.wanted
        cluster.together(
            lambda: require_merge(self.job, self.job.out, begun=False) if merges else None
        )
        cluster.same_inputs(digests)
        cluster.same_layout(self.layout)
        self.digest = self.job.digest(digests)
        self.directory = self._open(digests)
        path = self.directory.path
        lock = cluster.together(lambda: run_lock(path) if first else None)
        try:
            cluster.require_shared(path)
            cluster.together(lambda: self._record(digests) if first else None)
            with rank_log(path, rank(), self._device()) as self.log:
                # rank 0 writes the built-in inputs; the others find them
                made = cluster.together(lambda: self._inputs() if first else None)
                self.inputs = cluster.together(lambda: made or self._inputs())
                self.job = self.inputs.job.replace(layout=self.layout)
                self._announce()
                for stage in self.wanted:
                    self._stage(stage)
                return self._summary()
        finally:
            if lock is not None:
                lock.release()

    def _open(self, digests: Mapping[str, str]) -> RunDirectory:
        """Rank 0 chooses the run directory."""
        allow = frozenset(filter(None, self.job.allow_change.replace("-", "_").split(",")))

        def choose() -> RunDirectory:
            directory, remarks = open_run(self.job, self.digest, digests, allow, trained=self.again)
            for remark in remarks:
                self.console.print(escape(remark), highlight=False)
            return directory

        chosen = self.cluster.together(lambda: choose() if rank() == 0 else None)
        directory = self.cluster.from_first(chosen)
        assert directory is not None
        return directory

    def _record(self, digests: Mapping[str, str]) -> None:
        for left in record_job(
            self.directory, self.job, self.digest, digests, forwarded_variables()
        ):
            self.console.print(escape(f"removed {left}, of an interrupted run"), highlight=False)
        if "merge" in self.wanted and not self.directory.done("merge"):
            require_merge(self.job, self.directory.path, begun=True)

    def _inputs(self) -> Inputs:
        return prepare_inputs(self.job, self.resolution, self.directory.path)

    def _device(self) -> str:
        from autodeco.engines.select import choose_device

        try:
            return str(choose_device(self.job.device))
        except AutodecoError:  # the stages that need it will say so
            return self.job.device

    def _announce(self) -> None:
        family, preset = self.resolution.family, self.resolution.preset
        self.console.print(
            f"[bold]autodeco[/bold] {family.title}, preset {preset.name} "
            f"({self.resolution.reason}), model {escape(str(self.job.model))}",
            highlight=False,
        )
        if self.layout != self.asked_layout:
            self.console.print(f"layout {self.layout}, by the memory of the processes")
        self.console.print(escape(f"run directory {self.directory.path}"), highlight=False)

    def _stage(self, stage: str) -> None:
        if rank() != 0 and stage in _AFTER_TRAINING:
            return
        body = getattr(self, f"_{stage}")
        memory_only = stage in ("build", "attach")
        options = {name: self.job.to_json()[name] for name in STAGE_OPTIONS.get(stage, ())}
        if self.again or self._done_otherwise(stage, options):
            for stale in (
                STAGES[STAGES.index(stage) :] if stage == "export" else (stage,)
            ):  # they read its heads
                remove(self.directory.manifest(stale))
        if self.directory.done(stage) and not memory_only and self._has_output(stage):
            self.console.print(f"{stage}: done before, skipped", highlight=False)
            made = str(self.directory.read_manifest(stage).get("made", ""))
            self.state.rows.append((stage, made, 0.0))
            return
        if memory_only and not self._model_is_needed():
            return
        if stage in _AFTER_TRAINING:
            end_early(StopWatch(self.job.time_limit).wanted(), f"no time is left for {stage}")
        self.console.print(f"[bold]{stage}[/bold]", highlight=False)
        self.log.info("%s begins", stage)
        began = time.monotonic()
        made, outputs = body()
        seconds = time.monotonic() - began
        self.log.info("%s ends after %.1f s: %s", stage, seconds, made or "skipped")
        if rank() == 0 and made is not None:
            more = {"options": options} if options else {}
            self.directory.complete(stage, seconds, made=made, **more, **outputs)
        self.state.rows.append((stage, made or "skipped", seconds))

    def _has_output(self, stage: str) -> bool:
        """Whether what a done stage made is still there."""
        made = {"export": "heads", "merge": "merged", "evaluate": "evaluation.json"}
        nothing = {"merge": self.job.merge == "none", "evaluate": self.inputs.problems is None}
        return (
            stage not in made
            or nothing.get(stage, False)
            or (self.directory.path / made[stage]).exists()
        )

    def _done_otherwise(self, stage: str, options: Mapping[str, Any]) -> bool:
        """Whether the stage was done before, with other values of the options it depends on."""
        if not options or not self.directory.done(stage):
            return False
        found = self.directory.read_manifest(stage).get("options")
        before = found if isinstance(found, dict) else {}
        changed = [name for name, value in options.items() if before.get(name) != value]
        if changed:
            names = ", ".join(changed)
            self.console.print(f"{stage}: done before with another {names}", highlight=False)
        return bool(changed)

    def _model_is_needed(self) -> bool:
        left = [s for s in self.wanted if s not in ("build", "attach")]
        return any(s in _NEEDS_MODEL and not self.directory.done(s) for s in left) or not left

    def _imported(self) -> ImportedWeights:
        if self.state.weights is None:
            self.state.weights = self.hooks.import_weights(job=self.job)
        assert self.state.weights is not None
        return self.state.weights

    def _source(self) -> ImportedWeights:
        """The checkpoint as it was given: what rank 0 alone needs after the training."""
        if self.state.weights is not None:
            return self.state.weights
        source = self.job.replace(import_format="hf")
        found: ImportedWeights | None = self.hooks.import_weights(job=source)
        assert found is not None
        return found

    def _built(self) -> BuiltModel:
        if self.state.model is None:
            self.state.model = self.hooks.build_model(job=self.job, weights=self._imported())
        assert self.state.model is not None
        return self.state.model

    def _headed(self) -> HeadedModel:
        if self.state.headed is None:
            self.state.headed = self.hooks.attach_heads(job=self.job, model=self._built())
        assert self.state.headed is not None
        return self.state.headed

    def _import(self) -> tuple[str, dict[str, Any]]:
        weights = self._imported()
        count = len(weights.weight_map.source_sizes())
        dropped = dict(weights.weight_map.dropped)
        for name, reason in sorted(dropped.items())[:3]:
            self.console.print(escape(f"  dropped {name}: {reason}"), highlight=False)
        made = f"{count} tensors mapped, {len(dropped)} dropped, format {weights.format}"
        return made, {"format": weights.format, "dropped": dropped, "path": str(weights.path)}

    def _build(self) -> tuple[str, dict[str, Any]]:
        engine = self._built().engine
        announce(engine, self.console)
        made = f"engine {engine.name} on {engine.device}, {str(engine.dtype).split('.')[-1]}"
        return made, {"engine": engine.name, "device": str(engine.device)}

    def _attach(self) -> tuple[str, dict[str, Any]]:
        count = sum(p.numel() for p in self._headed().heads.parameters())
        return f"heads {self.job.heads}, {count:,} parameters", {"parameters": count}

    def _train(self) -> tuple[str, dict[str, Any]]:
        from autodeco.heads.attach import heads_metadata
        from autodeco.training.loop import train

        headed = self._headed()
        train_set, eval_set = self.inputs.load_training_data(
            headed.model.engine.vocab_size, self.console
        )
        result = train(
            self.job,
            headed.model.engine,
            headed.heads,
            train_set,
            eval_set,
            self.directory.path,
            self.inputs.model_name,
            digest=self.digest,
            metadata=heads_metadata(self.job, self.resolution.family.id, self._imported().path),
            console=self.console,
        )
        made = f"{result.steps} steps, {result.samples} samples"
        if result.best_loss is not None:
            made += f", best held-out loss {result.best_loss:.4f} at step {result.best_step}"
        return made, {"steps": result.steps, "best_step": result.best_step}

    def _export(self) -> tuple[str, dict[str, Any]]:
        from autodeco.training.checkpoint import find_checkpoint, load_into

        checkpoint = find_checkpoint(self.directory.path / "checkpoints", self.job.checkpoint)
        model = BuiltModel(None, self._source())
        fresh = self.hooks.attach_heads(job=self.job.replace(init_heads=None), model=model)
        load_into(fresh.heads, checkpoint)
        target = self.directory.path / "heads"
        remove(self.directory.path / "merged")  # of the heads before
        remove(target)
        artifact = self.hooks.export_heads(
            job=self.job, model=HeadedModel(model, fresh.heads, checkpoint.name), path=target
        )
        return f"{artifact.path} from {checkpoint.name}", {"checkpoint": checkpoint.name}

    def _merge(self) -> tuple[str | None, dict[str, Any]]:
        from autodeco.convert.workers import BytesProgress
        from autodeco.heads.merge import merge

        target = self.directory.path / "merged"
        remove(target)
        if self.job.merge == "none":
            self.console.print("  --merge none: nothing is merged", highlight=False)
            return "nothing (--merge none)", {}
        report = merge(
            self._source().path,
            self.directory.path / "heads",
            target,
            layout=self.job.merge,
            copy=self.job.copy or (None if self.built_in else False),
            progress=lambda total: BytesProgress(self.console, "merge", total),
        )
        return f"{target} ({report.describe()})", {"layout": self.job.merge}

    def _evaluate(self) -> tuple[str | None, dict[str, Any]]:
        from autodeco.decoding.evaluation import load_problems
        from autodeco.decoding.stage import evaluate_and_report
        from autodeco.heads.files import load_heads
        from autodeco.training.tokenization import eos_token_ids

        if self.inputs.problems is None:
            self.console.print(
                "  no --problems FILE (lines of problem and gt): evaluation skipped",
                highlight=False,
            )
            return "nothing (no --problems)", {}
        from autodeco.engines.select import decoding_model

        job, engine, tokenizer = self.job, self._built().engine, self.inputs.tokenizer()
        assert job.model is not None
        outcome = evaluate_and_report(
            decoding_model(engine, self._built().weights, job),
            load_heads(self.directory.path / "heads").heads.to(engine.device),
            tokenizer,
            load_problems(self.inputs.problems, limit=job.evaluate_problems),
            self.directory.path,
            base=job.model,
            eos_ids=eos_token_ids(job.model, tokenizer),
            job=job.to_json(),
            console=self.console,
            log_seconds=job.log_seconds,
            rows_at_once=job.evaluate_rows,
            samples=job.evaluate_samples,
            max_new_tokens=job.max_new_tokens,
            seed=job.evaluate_seed,
            problem_format=job.problem_format,
            method=job.answer_check,
            chat_template_kwargs=job.chat_template_kwargs,
        )
        self.state.evaluation = outcome
        return str(outcome.report), {"verdict": outcome.verdict}

    def _summary(self) -> RunSummary:
        outcome = self.state.evaluation
        results = self.directory.path / "evaluation.json"
        return RunSummary(
            self.directory.path,
            tuple(self.state.rows),
            read_object(results) if results.exists() else None,
            outcome.table if outcome else None,
        )


__all__ = ["STAGES", "AutodecoError", "RunSummary", "run_job"]
