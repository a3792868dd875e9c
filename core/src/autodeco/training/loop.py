"""The training loop: hidden states from the engine, gradients of the heads alone."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from autodeco.engines.base import Engine
from autodeco.errors import DataError, NumericsError, RunError, UsageError
from autodeco.files import remove_partial
from autodeco.heads.modules import DecodingHeads
from autodeco.heads.objective import OBJECTIVES, ObjectiveSums, objective_sums
from autodeco.job import Job
from autodeco.stopping import Stop, StopWatch, end_early
from autodeco.training.batching import global_batch_at, microbatches, steps_per_epoch
from autodeco.training.checkpoint import (
    TrainingState,
    load_newest,
    remove_old,
    save_checkpoint,
)
from autodeco.training.data import Sample, SampleSet
from autodeco.training.logging import MetricsLog, ProgressLine
from autodeco.training.parallel import (
    add_gradients,
    add_sums,
    from_first,
    largest_of_ranks,
    rank_and_world,
    wait_for_all,
)
from autodeco.training.schedule import Schedule
from autodeco.training.validation import collapse_warning, measure, summarize


@dataclass(frozen=True)
class TrainResult:
    """What a training run came to.

    Attributes:
        steps: Steps done.
        samples: Samples seen.
        best_step: The step with the lowest held-out loss of the objective.
        best_loss: That loss.
        metrics: The last held-out measurement.
    """

    steps: int
    samples: int
    best_step: int
    best_loss: float | None
    metrics: Mapping[str, float]


def train(
    job: Job,
    engine: Engine,
    heads: DecodingHeads,
    train_set: SampleSet,
    eval_set: SampleSet,
    directory: Path,
    model_name: str,
    *,
    digest: str,
    metadata: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Trains the heads, continuing from the newest whole checkpoint in `directory`.

    Under torch.distributed every copy of the model takes its share of each global batch. All ranks
    hold the heads and take the same step with the sum of the gradients, so that they stay equal bit
    for bit, and rank 0 alone writes.

    Args:
        job: Schedule, batch sizes, objective, seeds.
        engine: The frozen backbone.
        heads: Trained in place, float32, on the engine's device.
        train_set: Samples to learn from.
        eval_set: Held-out samples.
        directory: The run directory.
        model_name: For checkpoint names.
        digest: The job's hash, recorded.
        metadata: Recorded in every checkpoint's config.json.
        console: Where progress goes.

    Raises:
        DataError: There is nothing to learn from.
        UsageError: The objective averages over samples, and the engine has parts of them.
        RunError: The checkpoints are of other heads.
        StoppedEarly: SIGTERM or SIGUSR1 came, or the time limit; a checkpoint was written.
        KeyboardInterrupt: SIGINT came; a checkpoint was written after the step.
        NumericsError: A loss or a gradient is not finite; the last checkpoint is intact.
        EnvironmentProblem: A checkpoint cannot be written.
    """
    if not train_set.samples:
        raise DataError("no training samples", where=str(train_set.path), fix="check the data")
    if OBJECTIVES[job.objective].per_sample and not engine.whole_samples:
        raise UsageError(
            f"--objective {job.objective} averages over whole samples, and context-parallel ranks "
            "have parts of each",
            fix="use cp=1 in --layout, or another objective",
        )
    loop = _Loop(job, engine, heads, train_set.samples, eval_set.samples, directory, model_name)
    loop.digest, loop.metadata = digest, dict(metadata or {})
    loop.console = console or Console(stderr=True)
    return loop.run()


class _Loop:
    digest: str
    metadata: dict[str, Any]
    console: Console

    def __init__(
        self,
        job: Job,
        engine: Engine,
        heads: DecodingHeads,
        samples: tuple[Sample, ...],
        held_out: tuple[Sample, ...],
        directory: Path,
        model_name: str,
    ) -> None:
        self.job, self.engine, self.heads = job, engine, heads
        self.samples, self.held_out = samples, held_out
        self.directory, self.model_name = directory, model_name
        self.objective = OBJECTIVES[job.objective]
        self.rank, _ = rank_and_world()
        available = job.epochs * steps_per_epoch(len(samples), job.global_batch)
        self.total = min(job.max_steps, available) if job.max_steps else available
        self.schedule = Schedule(
            job.learning_rate,
            job.min_learning_rate,
            job.warmup_steps,
            job.constant_steps,
            self.total,
        )
        self.optimizer = torch.optim.AdamW(
            heads.parameters(), lr=job.learning_rate, weight_decay=job.weight_decay, foreach=False
        )
        self.step = self.seen = self.moved = self.best_step = 0
        self.best_loss: float | None = None
        self.last: dict[str, float] = {}
        self.output = engine.output_weight()

    def run(self) -> TrainResult:
        resumed = self._resume()
        first = self.rank == 0
        log = None
        if first:
            since = self.step if resumed else None
            log = MetricsLog(self.directory, since, self.job.track, self.job.to_json())
        console = self.console if first else Console(quiet=True)
        progress = ProgressLine(console, self.total, self.step, self.job.log_seconds)
        try:
            with StopWatch(self.job.time_limit) as watch, progress:
                if not resumed:
                    with watch.timed("evaluation"):
                        self._evaluate(log)
                    with watch.timed("checkpoint"):
                        self._save()
                while self.step < self.total:
                    with watch.timed("step"):
                        self._one_step(log, progress)
                    last = self.step == self.total
                    due = last or self.step % self.job.eval_every == 0
                    with watch.timed("evaluation"):
                        improved = due and self._evaluate(log)
                    stop = Stop(largest_of_ranks(watch.wanted(), self.engine.device))
                    if last or improved or stop or self.step % self.job.save_every == 0:
                        with watch.timed("checkpoint"):
                            self._save()
                    end_early(stop, f"at step {self.step}/{self.total}, with a checkpoint")
        finally:
            if log is not None:
                log.close()
        best = self.best_step if self.held_out else self.step
        return TrainResult(self.step, self.seen, best, self.best_loss, self.last)

    def _warn(self, text: str) -> None:
        if self.rank == 0:
            self.console.print(f"  {text}", style="yellow", markup=False, highlight=False)

    def _resume(self) -> bool:
        """Continues from the newest whole checkpoint; returns whether there is one."""
        folder = self.directory / "checkpoints"
        if self.job.max_steps and self.total < self.job.max_steps:
            self._warn(
                f"--max-steps {self.job.max_steps} is more than the data gives in "
                f"{self.job.epochs} epochs: {self.total} steps"
            )
        if not self.held_out:
            self._warn("no held-out samples: nothing is measured, and the best is the last")
        if self.rank == 0:
            remove_partial(folder)
        # as CPU tensors: those of rank 0's GPU would come to that GPU on every rank
        mine = {name: tensor.cpu() for name, tensor in self.heads.state_dict().items()}
        start = (mine, None, None)
        found = (load_newest(folder, self._warn) or start) if self.rank == 0 else start
        tensors, moments, state = from_first(found)
        try:
            self.heads.load_state_dict(tensors)
        except RuntimeError as error:
            raise RunError(
                "the checkpoints of this run are of other heads",
                where=str(folder),
                fix="begin another run with --resume new",
            ) from error
        if state is None or moments is None:
            return False
        _load_moments(self.optimizer, self.heads, moments, state.optimizer_steps)
        self.step, self.seen, self.moved = state.step, state.samples, state.optimizer_steps
        self.best_step, self.best_loss = state.best_step, state.best_loss
        self.last = dict(state.metrics)
        if self.rank == 0:
            remove_old(folder, self.job.keep, state.best_step)  # a kill may have come before it
            self.console.print(f"  resumed at step {self.step}/{self.total}", highlight=False)
        return True

    def _one_step(self, log: MetricsLog | None, progress: ProgressLine) -> None:
        began = time.monotonic()
        epoch, indices = global_batch_at(
            self.step, len(self.samples), self.job.global_batch, self.job.seed
        )
        batch = [self.samples[i] for i in indices]
        mine = microbatches(
            batch,
            self.job.micro_batch_tokens,
            world_size=self.engine.data_world,
            rank=self.engine.data_rank,
            packed=self.engine.packs,
            stages=self.engine.stages,
        )
        self.optimizer.zero_grad(set_to_none=False)
        sums = ObjectiveSums.zero()
        for hidden in self.engine.hidden_states(mine):
            if hidden is not None:
                sums += objective_sums(
                    self.heads,
                    hidden,
                    self.output,
                    self.objective,
                    seed=self.job.seed,
                    epoch=epoch,
                    backward=True,
                    drop=self.job.drop,
                )
        sums = add_sums(sums if self.engine.counts else ObjectiveSums.zero(), self.engine.device)
        rate = self.schedule.rate(self.step)
        # Without a kept token there is no gradient, and momentum alone shall not move the heads.
        moves = sums.normalizer and (sums.kept or not self.objective.drop_top_p)
        norm = self._move(sums.normalizer, rate) if moves else 0.0
        self.step += 1
        self.seen += len(batch)
        if log is not None:
            values = summarize(sums)
            seconds = time.monotonic() - began
            extra = {
                "learning_rate": rate,
                "gradient_norm": norm,
                "samples": float(self.seen),
                "seconds": seconds,
                "tokens_per_second": sum(len(s.ids) for s in batch) / max(seconds, 1e-9),
            }
            log.write("train", self.step, {**values, **extra})
            progress.update(self.step, values)

    def _move(self, normalizer: int, rate: float) -> float:
        """Sums the gradients over ranks, divides, clips, and takes one optimizer step."""
        gradients = [
            p.grad if p.grad is not None else torch.zeros_like(p) for p in self.heads.parameters()
        ]
        flat = torch.cat([g.flatten() for g in gradients])
        if not self.engine.counts:  # another rank of this copy of the model gives the same
            flat.zero_()
        add_gradients(flat)
        flat /= normalizer
        norm = float(flat.norm())
        if not torch.isfinite(flat).all():
            raise NumericsError(
                "the gradient of the heads is not finite",
                where=f"step {self.step}",
                fix="the last checkpoint is intact; try a smaller --learning-rate",
            )
        if norm > self.job.clip:
            flat *= self.job.clip / norm
        pieces = torch.split(flat, [g.numel() for g in gradients])
        for parameter, piece in zip(self.heads.parameters(), pieces, strict=True):
            parameter.grad = piece.view_as(parameter).clone()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.moved += 1
        return norm

    def _evaluate(self, log: MetricsLog | None) -> bool:
        """Measures on the held-out samples; returns whether the heads are the best so far."""
        if not self.held_out:
            return False
        mine = microbatches(
            self.held_out,
            self.job.micro_batch_tokens,
            world_size=self.engine.data_world,
            rank=self.engine.data_rank,
            packed=self.engine.packs,
            stages=self.engine.stages,
        )
        metrics = measure(self.engine, self.heads, mine, self.objective, seed=self.job.seed)
        self.last = metrics
        # by the objective itself: NLL before the cut does not see the top-p head at all
        improved = self.best_loss is None or metrics["loss"] < self.best_loss
        if improved:
            self.best_loss, self.best_step = metrics["loss"], self.step
        if log is not None:
            log.write("eval", self.step, metrics)
            self._show(metrics)
        return improved

    def _show(self, metrics: dict[str, float]) -> None:
        self.console.print(
            f"  held out at step {self.step}: loss {metrics['loss']:.4f}, "
            f"NLL {metrics['nll']:.4f}, "
            f"{metrics['outside_nucleus']:.1%} of labels outside the nucleus, "
            f"T {metrics['temperature_mean']:.3f} ± {metrics['temperature_std']:.3f}, "
            f"P {metrics['top_p_mean']:.3f} ± {metrics['top_p_std']:.3f}",
            highlight=False,
        )
        warning = collapse_warning(metrics, self.heads)
        if warning:
            self._warn(warning)

    def _save(self) -> None:
        if self.rank == 0:
            state = TrainingState(
                self.step,
                self.seen,
                self.moved,
                self.total,
                self.job.seed,
                self.digest,
                self.best_step if self.held_out else self.step,
                self.best_loss,
                self.last,
            )
            folder = self.directory / "checkpoints"
            moments = _moments(self.optimizer, self.heads)
            save_checkpoint(folder, self.model_name, self.heads, moments, state, self.metadata)
            remove_old(folder, self.job.keep, state.best_step)
        wait_for_all()


def _moments(optimizer: torch.optim.Optimizer, heads: DecodingHeads) -> dict[str, Tensor]:
    """Returns Adam's moments by parameter name; empty before the first step."""
    result: dict[str, Tensor] = {}
    for name, parameter in heads.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            if key in optimizer.state.get(parameter, {}):
                result[f"{name}.{key}"] = optimizer.state[parameter][key]
    return result


def _load_moments(
    optimizer: torch.optim.Optimizer,
    heads: DecodingHeads,
    moments: Mapping[str, Tensor],
    steps: int,
) -> None:
    if not moments:
        return
    for name, parameter in heads.named_parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(steps)),
            "exp_avg": moments[f"{name}.exp_avg"].to(parameter.device),
            "exp_avg_sq": moments[f"{name}.exp_avg_sq"].to(parameter.device),
        }
