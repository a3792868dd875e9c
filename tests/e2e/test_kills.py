"""A whole run, killed with SIGKILL again and again, at random times in every stage.

The kills are aimed: at a random moment of a stage, counted from the file that ends the one before,
since the short stages would hardly be hit by chance.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from crash_tools import Server, finished, outcome

from autodeco import stories

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]

KILLS = 28
SIGKILLED = -9
# Stage -> the file that is there when it begins (None: when the process begins).
BEGINNINGS = {
    "start": None,
    "build": "out/*/*/stages/import.json",
    "train": "out/*/*/stages/attach.json",
    "export": "out/*/*/stages/train.json",
    "merge": "out/*/*/stages/export.json",
    "evaluate": "out/*/*/stages/merge.json",
}


@pytest.mark.parametrize("layout", ["native", "autodeco"])
def test_a_run_killed_at_random_ends_as_one_that_was_not(tmp_path: Path, layout: str) -> None:
    server = Server(tmp_path)
    held_out = tmp_path / "held_out.jsonl"
    stories.write_records(held_out, 5, "heldout", 8)

    def options(place: str) -> dict[str, Any]:
        return {
            "out": tmp_path / place / "out",
            "eval_data": held_out,
            "task_samples": 24,
            "global_batch": 4,
            "max_steps": 5,
            "save_every": 1,
            "eval_every": 2,
            "keep": 2,
            "merge": layout,
            "evaluate_problems": 1,
            "max_new_tokens": 4,
        }

    try:
        whole = server.run(options("whole"))
        assert whole["code"] == 0, whole.get("error")
        expected, seconds = outcome(tmp_path / "whole" / "out"), whole["seconds"]
        seconds["start"] = 0.3
        draw, killed, number = random.Random(f"kills {layout}"), Counter[str](), 0
        runs = 0
        while killed.total() < KILLS:
            place, runs = f"killed-{runs}", runs + 1
            out = tmp_path / place / "out"
            for stage in [*BEGINNINGS, "train", "train"]:
                if finished(out):
                    break
                number += 1
                plan = {
                    "root": str(tmp_path / place),
                    "pattern": BEGINNINGS[stage],
                    "delay": draw.uniform(0, 1.2 * seconds[stage]),
                }
                answer = server.run(options(place), kill=plan)
                assert answer["code"] in (0, SIGKILLED), answer
                killed[stage] += answer["code"] == SIGKILLED
            if not finished(out):
                last = server.run(options(place))
                assert last["code"] == 0, last.get("error")
            got = outcome(out)
            for part, value in expected.items():
                assert got[part] == value, f"run {runs}: other {part}"
    finally:
        server.close()
    assert killed["train"] >= 3 and len([s for s in killed if killed[s]]) >= 5, killed
    print(f"{layout}: {killed.total()} kills in {runs} runs: {dict(killed)}")
