"""The loop: it learns, accumulates, resumes bit for bit, keeps what it shall keep."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from training_tools import (
    TinyEngine,
    outcome,
    run_training,
    sample_set,
    tiny_heads,
    tiny_job,
)

from autodeco.errors import DataError, NumericsError, RunError, StoppedEarly
from autodeco.heads.files import load_heads
from autodeco.heads.objective import OBJECTIVES, objective_sums
from autodeco.training.batching import microbatches
from autodeco.training.checkpoint import find_checkpoint, list_checkpoints, step_of
from autodeco.training.logging import METRICS, read_metrics
from autodeco.training.loop import train


class StopAt(TinyEngine):
    """Does something in the midst of a step: at the n-th batch of hidden states."""

    def __init__(self, batch: int, action: Any) -> None:
        super().__init__()
        self.left, self.action = batch, action

    def hidden_states(self, batches: Any) -> Any:
        for hidden in super().hidden_states(batches):
            self.left -= 1
            if self.left == 0:
                self.action()
            yield hidden


def rows(directory: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_metrics(directory / METRICS) if row["kind"] == kind]


@pytest.mark.parametrize("heads", ["both", "temperature", "top-p"])
def test_the_held_out_loss_decreases(tmp_path: Path, heads: str) -> None:
    job = tiny_job(epochs=8, heads=heads)
    result = run_training(tmp_path, job, samples=40, held_out=20, heads=tiny_heads(heads))
    losses = [row["loss"] for row in rows(tmp_path, "eval")]
    assert result.steps == 80 and result.samples == 320
    assert result.best_loss == min(losses) < losses[0] - 0.02
    if heads != "top-p":
        assert rows(tmp_path, "eval")[-1]["temperature_std"] > 0.2  # it tells tokens apart


def test_it_measures_at_the_start_every_n_steps_and_at_the_end(tmp_path: Path) -> None:
    result = run_training(tmp_path, tiny_job(epochs=2))
    assert [row["step"] for row in rows(tmp_path, "eval")] == [0, 4, 8, 10]
    assert [row["step"] for row in rows(tmp_path, "train")] == list(range(1, 11))
    assert result.metrics == {
        k: v for k, v in rows(tmp_path, "eval")[-1].items() if k not in ("kind", "step")
    }


def test_epochs_limit_max_steps_aloud(tmp_path: Path) -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=200)
    result = run_training(tmp_path, tiny_job(max_steps=99), console=console)
    assert result.steps == 10
    assert "--max-steps 99 is more than the data gives in 2 epochs: 10 steps" in screen.getvalue()
    assert run_training(tmp_path / "few", tiny_job(max_steps=3)).steps == 3


@pytest.mark.parametrize("at", [1, 2, 9, 14, 23])
def test_a_signal_ends_with_a_checkpoint_and_resuming_is_bit_identical(
    tmp_path: Path, at: int
) -> None:
    job = tiny_job(drop=0.5)
    run_training(tmp_path / "whole", job)
    number = signal.SIGTERM if at % 2 else signal.SIGINT
    handler = signal.getsignal(number)
    with pytest.raises(StoppedEarly if at % 2 else KeyboardInterrupt):
        engine = StopAt(at, lambda: os.kill(os.getpid(), number))
        run_training(tmp_path / "cut", job, engine=engine)
    assert signal.getsignal(number) == handler
    seen = [row["step"] for row in rows(tmp_path / "cut", "train")]
    assert step_of(list_checkpoints(tmp_path / "cut" / "checkpoints")[-1]) == len(seen) < 10
    run_training(tmp_path / "cut", job, heads=tiny_heads(seed=5))
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path, tiny_job(), engine=StopAt(12, twice))
    job = tiny_job()
    run_training(tmp_path, job)
    run_training(tmp_path / "whole", job)
    assert outcome(tmp_path) == outcome(tmp_path / "whole")


def test_resuming_does_not_depend_on_the_global_generators(tmp_path: Path) -> None:
    job = tiny_job(drop=0.3)
    run_training(tmp_path / "whole", job)
    for batch in (11, 9, 7):
        with pytest.raises(StoppedEarly):
            engine = StopAt(batch, lambda: os.kill(os.getpid(), signal.SIGTERM))
            run_training(tmp_path / "cut", job, engine=engine)
        torch.manual_seed(batch)
    run_training(tmp_path / "cut", job)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_a_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    first = run_training(tmp_path, tiny_job())
    before = outcome(tmp_path)
    assert run_training(tmp_path, tiny_job()) == first
    assert outcome(tmp_path) == before


def test_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    # A rate that ruins the heads: the best is an early one.
    result = run_training(
        tmp_path, tiny_job(learning_rate=5.0, epochs=4, eval_every=1, save_every=1, keep=3)
    )
    folder = tmp_path / "checkpoints"
    steps = [step_of(path) for path in list_checkpoints(folder)]
    losses = {row["step"]: row["loss"] for row in rows(tmp_path, "eval")}
    assert result.best_step == min(losses, key=lambda s: (losses[s], s)) < 18
    assert steps == [result.best_step, 18, 19, 20]
    assert step_of(find_checkpoint(folder, "best")) == result.best_step
    assert step_of(find_checkpoint(folder, "last")) == 20
    assert step_of(find_checkpoint(folder, "19")) == 19
    for wrong in ("7", "x", "-1", ""):
        with pytest.raises(RunError, match="no checkpoint"):
            find_checkpoint(folder, wrong)
    load_heads(folder / f"tiny-{result.best_step}-{4 * result.best_step}")  # is a heads directory


def test_without_held_out_samples_the_best_is_the_last(tmp_path: Path) -> None:
    screen = io.StringIO()
    result = run_training(tmp_path, tiny_job(), held_out=0, console=Console(file=screen, width=200))
    assert result.best_loss is None and result.best_step == 10 and result.metrics == {}
    assert find_checkpoint(tmp_path / "checkpoints", "best").name == "tiny-10-40"
    assert "no held-out samples" in screen.getvalue()


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_accumulation_does_not_change_the_gradient(objective: str) -> None:
    engine, samples = TinyEngine(), sample_set(12, 3).samples
    gradients = []
    for tokens in (1, 20, 10_000):
        heads, kept, batches = tiny_heads(), 0, microbatches(samples, tokens)
        for hidden in engine.hidden_states(batches):
            assert hidden is not None
            kept += objective_sums(
                heads,
                hidden,
                engine.output_weight(),
                OBJECTIVES[objective],
                seed=0,
                epoch=0,
                backward=True,
            ).normalizer
        parts = [p.grad.flatten() for p in heads.parameters() if p.grad is not None]
        gradients.append((len(batches), torch.cat(parts) / kept))
    assert len({count for count, _ in gradients}) == 3
    for _, gradient in gradients[1:]:
        assert gradient.norm() > 1e-3
        torch.testing.assert_close(gradient, gradients[0][1], rtol=1e-5, atol=1e-6)


def test_small_and_large_microbatches_train_the_same_heads(tmp_path: Path) -> None:
    # The temperature head alone is compared bit by bit, nearly: a hidden unit of the top-p head
    # can have a gradient below rounding (1e-8), which Adam turns into whole steps of either sign.
    both, losses = [], []
    for name, tokens in (("small", 1), ("large", 10_000)):
        heads, job = tiny_heads("temperature"), tiny_job(micro_batch_tokens=tokens)
        run_training(tmp_path / name, job, heads=heads)
        both.append(torch.cat([p.detach().flatten() for p in heads.parameters()]))
        run_training(tmp_path / f"{name}-both", job)
        losses.append([row["loss"] for row in rows(tmp_path / f"{name}-both", "train")])
    torch.testing.assert_close(both[0], both[1], rtol=0, atol=1e-4)
    assert losses[0] == pytest.approx(losses[1], rel=1e-2) and len(losses[0]) == 10


def test_a_step_without_kept_tokens_counts_and_leaves_the_heads(tmp_path: Path) -> None:
    class Sure(TinyEngine):
        """Predicts every label: with drop 1 nothing is kept."""

        def hidden_states(self, batches: Any) -> Any:
            for hidden in super().hidden_states(batches):
                at = (hidden.h @ self.weight.T).argmax(-1)
                yield type(hidden)(hidden.h, at, hidden.sample_id, hidden.token_index)

    heads, before = tiny_heads(), tiny_heads().state_dict()
    job = tiny_job(drop=1.0, weight_decay=0.1)
    result = run_training(tmp_path, job, heads=heads, engine=Sure())
    assert result.steps == 10
    assert {row["kept"] for row in rows(tmp_path, "train")} == {0.0}
    assert all(torch.equal(before[k], v) for k, v in heads.state_dict().items())


def test_gradients_are_clipped(tmp_path: Path) -> None:
    whole, clipped, heads = tiny_heads(), tiny_heads(), tiny_heads()
    run_training(tmp_path / "a", tiny_job(max_steps=1), heads=whole)
    run_training(tmp_path / "b", tiny_job(max_steps=1, clip=1e-9), heads=clipped)
    # Adam does not see a factor, unless the gradient falls to the size of its epsilon (1e-8).
    moves = [
        max(
            float((a - b).detach().abs().max())
            for a, b in zip(h.parameters(), heads.parameters(), strict=True)
        )
        for h in (whole, clipped)
    ]
    assert moves[0] > 9e-3 and moves[1] < 2e-3
    assert rows(tmp_path / "b", "train")[0]["gradient_norm"] > 1e-3  # before clipping


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_checkpoint(tmp_path: Path) -> None:
    def broken(batch: int) -> TinyEngine:
        engine = StopAt(batch, lambda: engine.weight.fill_(float("nan")))
        return engine

    with pytest.raises(NumericsError, match="not finite"):
        run_training(tmp_path, tiny_job(), engine=broken(15))
    assert list_checkpoints(tmp_path / "checkpoints")
    run_training(tmp_path, tiny_job())
    run_training(tmp_path / "whole", tiny_job())
    assert outcome(tmp_path) == outcome(tmp_path / "whole")


def test_other_heads_are_refused(tmp_path: Path) -> None:
    run_training(tmp_path, tiny_job(max_steps=2))
    with pytest.raises(RunError, match="other heads"):
        run_training(tmp_path, tiny_job(), heads=tiny_heads("temperature"))


def test_no_samples_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no training samples"):
        train(
            tiny_job(),
            TinyEngine(),
            tiny_heads(),
            sample_set(0, 1),
            sample_set(2, 2),
            tmp_path,
            "tiny",
            digest="",
        )


def test_microbatches_respect_the_limit(tmp_path: Path) -> None:
    engine = TinyEngine()
    run_training(tmp_path, tiny_job(micro_batch_tokens=20), engine=engine)
    assert engine.largest_batch <= 20


def test_a_collapse_is_said(tmp_path: Path) -> None:
    heads, screen = tiny_heads(), io.StringIO()
    with torch.no_grad():
        heads.top_p_head.mlp[2].bias.fill_(30.0)  # type: ignore[union-attr]
    run_training(
        tmp_path, tiny_job(max_steps=1), heads=heads, console=Console(file=screen, width=300)
    )
    assert "the top-p head has collapsed to 1 " in screen.getvalue()
    assert "temperature head has collapsed" not in screen.getvalue()
