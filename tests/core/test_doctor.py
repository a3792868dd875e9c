"""`autodeco doctor` on one machine: what is there, what is missing, what is not what it seems."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autodeco.cli import main
from autodeco.doctor import machine, packages
from autodeco.doctor.probes import examine, probes
from autodeco.doctor.report import MISSING, OK, PROBLEM, Row, exit_code, table
from autodeco_plugin_qwen3.family import FAMILY

Site = Callable[..., None]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """Installs made-up distributions before all others: metadata, and empty modules."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)

    def install(name: str, version: str, *files: str, entry: str = "") -> None:
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        if entry:
            (info / "entry_points.txt").write_text(entry)
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            # nothing may import it
            (folder / file).write_text("raise RuntimeError('imported')\n")

    return install


def only(rows: Iterator[Row]) -> Row:
    (row,) = rows
    return row


# --- the report


def test_report_of_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json", "--out", str(tmp_path / "a" / "b")])
    told = json.loads(capsys.readouterr().out)
    assert told["ok"]
    rows = {row["name"]: row for row in told["rows"]}
    assert {"python", "autodeco", "torch", "transformers", "plugin qwen3", "Apex", "vLLM"} <= set(
        rows
    )
    assert {"disk, --out", "disk, temporary", "shared memory", "--out, file locks"} <= set(rows)
    assert rows["--out, file locks"]["state"] == rows["torch"]["state"] == OK
    for row in rows.values():
        assert row["state"] in (OK, MISSING, PROBLEM)
        assert row["state"] == OK or row["cure"], f"{row['name']}: nothing is said to do"
    assert list(tmp_path.iterdir()) == [], "what was tried is removed again"


def test_people_see_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "file locks" in shown and "do:" in shown


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from autodeco.cli import main; main(['doctor', '--json'])\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'megatron') if m in sys.modules],"
        " file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("raised", [ZeroDivisionError("it"), SystemExit(3), OSError(5, "it")])
def test_a_failing_probe_is_a_row_and_stops_no_other(raised: BaseException) -> None:
    def bad() -> Iterator[Row]:
        yield Row("before", "1")
        raise raised

    rows = examine([("bad", bad), ("good", lambda: [Row("good", "2")])])
    assert [(row.name, row.state) for row in rows] == [
        ("before", OK),
        ("bad", PROBLEM),
        ("good", OK),
    ]
    assert type(raised).__name__ in rows[1].found
    assert exit_code(rows) == 0


def test_every_probe_survives_an_empty_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "version", lambda *_: None)
    monkeypatch.setattr(packages, "folder", lambda _: None)
    monkeypatch.setenv("PATH", "")
    rows = examine(probes(tmp_path))
    assert {row.name for row in rows if "could not be found out" in row.found} == set()
    assert exit_code(rows) == 7  # torch and transformers are needed
    table(rows, "all of it can be shown")


def test_exit_code_7_when_the_output_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--json", "--out", str(tmp_path / "file" / "runs")])
    told = json.loads(capsys.readouterr().out)
    assert stopped.value.code == 7 and not told["ok"]
    (row,) = (row for row in told["rows"] if row["state"] == PROBLEM)
    assert row["name"] == "--out, writable" and "choose another" in row["cure"]


def test_options_of_distributed_are_refused_without_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--layout", "tp=2"])
    assert stopped.value.code == 2 and "--distributed" in capsys.readouterr().err


# --- packages


def test_what_is_needed_and_missing_gives_7_and_the_command(monkeypatch: Any) -> None:
    wanted = ["numpy>=999", "nobody-wrote-this>=1", "wandb; extra == 'track'", "torch>=999"]
    monkeypatch.setattr(packages.metadata, "requires", lambda _: wanted)
    row = only(packages.dependencies())
    assert row.stops and "nobody-wrote-this is missing" in row.found
    assert row.cure == "pip install 'numpy>=999' 'nobody-wrote-this>=1' 'torch>=999'"


def test_bug_the_other_project_called_apex_is_not_taken_for_apex(site: Site) -> None:
    site("apex", "0.9.10", "apex/__init__.py", "apex/lib/__init__.py")
    row = only(packages.apex())
    assert row.state == PROBLEM and "another project" in row.found
    assert row.cure is not None and row.cure.startswith("pip uninstall apex")


@pytest.mark.parametrize(("kernels", "state"), [(("amp_C.py",), OK), ((), PROBLEM)])
def test_apex(site: Site, kernels: tuple[str, ...], state: str) -> None:
    parts = [f"apex/{part}/__init__.py" for part in ("multi_tensor_apply", "optimizers")]
    site("apex", "0.1", "apex/__init__.py", *parts, *kernels)
    row = only(packages.apex())
    assert (row.state, "without its compiled" in row.found) == (state, state == PROBLEM)


def test_transformer_engine_as_the_meta_package_alone(site: Site) -> None:
    site("transformer-engine", "2.9.0", "transformer_engine/__init__.py")
    row = only(packages.transformer_engine())
    assert row.state == PROBLEM and "not built" in row.found
    assert "--no-build-isolation" in str(row.cure)
    site("transformer-engine-cu13", "2.8.0")
    assert "different versions" in only(packages.transformer_engine()).found


@pytest.mark.parametrize("place", ["", "transformer_engine/", "transformer_engine/wheel_lib/"])
def test_transformer_engine_whole(site: Site, place: str) -> None:
    library = f"{place}transformer_engine_torch.cpython-311.so"
    site("transformer-engine", "2.9.0", "transformer_engine/__init__.py", library)
    row = only(packages.transformer_engine())
    assert (row.state, row.found) == (OK, "2.9.0")


@pytest.mark.parametrize(
    ("version", "state"), [("0.15.3", PROBLEM), ("0.16.9", OK), ("0.17.0", PROBLEM)]
)
def test_megatron_is_0_16(site: Site, version: str, state: str) -> None:
    site("megatron-core", version, "megatron/core/__init__.py")
    site("psutil", "7.0")
    core, _ = packages.megatron()
    assert core.state == state and core.found.startswith(version)


def test_psutil_is_a_problem_only_beside_megatron(monkeypatch: Any) -> None:
    there = {"megatron-core": "0.16.1"}
    monkeypatch.setattr(packages, "version", lambda *names: there.get(names[0]))
    monkeypatch.setattr(packages, "folder", lambda _: Path())
    assert [row.state for row in packages.megatron()] == [OK, PROBLEM]
    there.clear()
    assert [row.state for row in packages.megatron()] == [MISSING, MISSING]


def test_nemo_belongs_elsewhere(site: Site) -> None:
    assert only(packages.nemo()).state == MISSING
    site("nemo_toolkit", "2.7.3")
    row = only(packages.nemo())
    assert row.state == PROBLEM and "requirements/nemo.txt" in str(row.cure)


def test_broken_plugin_is_a_problem_but_the_others_work(site: Site) -> None:
    site(
        "autodeco-plugin-bad",
        "1.0",
        "bad_plugin.py",
        entry="[autodeco.plugins]\nbad = bad_plugin:x\n",
    )
    rows = {row.name: row for row in packages.plugins()}
    assert rows["plugin bad"].state == PROBLEM and not rows["plugin bad"].stops
    assert "RuntimeError: imported" in rows["plugin bad"].found
    assert rows["plugin qwen3"].state == OK


# --- the machine


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "echo 'NVIDIA X, 143771, 143000, 580.1'; echo 'NVIDIA Y, [N/A], [N/A], 580.1'"
    nvidia_smi(tmp_path, monkeypatch, lines)
    one, two = machine.gpus()
    assert one.found == "NVIDIA X, 140.4 GiB, 139.6 free, driver 580.1" and one.state == OK
    assert two.name == "GPU 1" and "NVIDIA Y" in two.found


def test_gpu_whose_driver_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, monkeypatch, "echo 'cannot speak with the driver'; exit 9")
    row = only(machine.gpus())
    assert row.state == PROBLEM and "cannot speak with the driver" in row.found


@pytest.mark.parametrize(
    ("cuda", "gpu", "facts", "states"),
    [
        (None, False, {}, {"torch": OK, "NCCL": MISSING}),
        (None, True, {}, {"torch": PROBLEM, "NCCL": MISSING}),
        ("13.0", False, {}, {"torch": OK, "NCCL": OK}),
        (
            "13.0",
            True,
            {"available": True, "count": 2, "nccl": "2.27.7"},
            {"torch": OK, "CUDA": OK, "NCCL": OK},
        ),
        (
            "13.0",
            True,
            {"available": False, "count": 0, "nccl": None},
            {"torch": OK, "CUDA": PROBLEM, "NCCL": OK},
        ),
        ("13.0", True, {"error": "libcudart"}, {"torch": OK, "CUDA": PROBLEM, "NCCL": OK}),
    ],
)
def test_torch_and_its_cuda(
    cuda: str | None, gpu: bool, facts: Any, states: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "ask_torch", lambda: facts)
    rows = list(machine.torch_rows("2.13.0", cuda, gpu))
    assert {row.name: row.state for row in rows} == states
    assert exit_code(rows) == (7 if PROBLEM in states.values() else 0)


def test_torch_answers_in_a_process_of_its_own() -> None:
    import torch

    assert machine.ask_torch()["available"] == torch.cuda.is_available()
    assert machine.cuda_of_build() == torch.version.cuda


def test_shared_memory_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(total=64 << 20, used=0, free=64 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    row = only(machine.shared_memory(tmp_path))
    assert row.state == PROBLEM and "--shm-size" in str(row.cure)
    assert only(machine.shared_memory(tmp_path / "none")).state == MISSING
    assert [row.stops for row in machine.disk(tmp_path)] == [True, True]


@pytest.mark.parametrize("kind", ["refused", "given twice"])
def test_filesystem_without_locks(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: Any) -> None:
        if kind == "refused":
            raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    rows = {row.name: row for row in machine.filesystem(tmp_path)}
    assert rows["--out, file locks"].stops and kind in rows["--out, file locks"].found
    assert list(tmp_path.iterdir()) == []


def test_filesystem_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    monkeypatch.setattr(machine, "reflink", lambda *_: True)
    rows = {row.name: row for row in machine.filesystem(tmp_path)}
    assert (rows["--out, hard links"].state, rows["--out, reflinks"].state) == (MISSING, OK)
    assert list(tmp_path.iterdir()) == []


# --- what the ranks say of each other


def infos(*versions: str) -> list[dict[str, Any]]:
    hosts = ("red", "red", "blue", "blue")
    return [
        {"rank": r, "host": hosts[r], "device": "cpu", "versions": {"torch": v, "python": "3.11"}}
        for r, v in enumerate(versions)
    ]


def test_differing_versions_are_named_by_rank_and_host() -> None:
    from autodeco.doctor.distributed import compare_versions

    row = compare_versions(infos("1", "1", "2", "2"))
    assert row.stops and row.found == "torch: 1 on red (ranks 0-1); 2 on blue (ranks 2-3)"
    found = infos("1", "1", "1", "1")
    del found[3]["versions"]["torch"]
    assert "not installed on blue (ranks 3)" in compare_versions(found).found
    assert compare_versions(infos("1", "1")).state == OK


def test_hosts_of_ranks_that_did_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    from autodeco.doctor.meeting import guess_host, ranges, slurm_hosts

    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert slurm_hosts("a[08-10,2],login,b[1-2]") == [
        *("a08", "a09", "a10", "a2", "login", "b1", "b2")
    ]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    assert guess_host(1, {0: "red"}) == "red"
    assert guess_host(2, {0: "red"}) == "machine 1, from which none came"
    monkeypatch.setenv("SLURM_JOB_NODELIST", "red,blue")
    assert "blue" in guess_host(2, {0: "red"})
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert guess_host(2, {0: "red"}) == "an unknown host"


@pytest.mark.parametrize(
    ("layout", "ranks", "preset", "at"),
    [
        ("tp=2", 2, "debug", "tp=2"),
        ("pp=2", 2, "debug-moe", "pp=2"),  # the first random preset that fits as it is
        ("ep=2", 2, "debug-moe", "ep=2"),
        ("pp=2,first=2", 4, "debug", "pp=2,first=2"),
        ("pp=8,ep=8,first=18,last=10", 64, "debug-moe", "pp=8,ep=8"),  # published; stretched
        ("tp=8,pp=4", 32, "debug", "tp=8,pp=4"),
        ("tp=4,ep=16", 64, "debug-moe", "tp=4,ep=16"),
    ],
)
def test_debug_model_at_any_layout(layout: str, ranks: int, preset: str, at: str) -> None:
    from autodeco.doctor.model import random_preset
    from autodeco.layout import ParallelLayout

    chosen, fitting = random_preset(FAMILY, ParallelLayout.parse(layout), ranks)
    assert (chosen.name, str(fitting)) == (preset, at)
    assert fitting.data_ranks(chosen.shape, ranks) >= 1


def test_who_differs_is_named() -> None:
    from autodeco.doctor.model import judge

    meeting: Any = SimpleNamespace(place=lambda r: f"rank {r} on host-{r}")
    row = judge(meeting, [[None, [0, 1]], [0.5, [0, 1]]], 5e-5, "it")
    assert row.stops and "rank 1 on host-1: 5.0e-01, fed by rank 0 on host-0" in row.found
    assert judge(meeting, [[float("nan"), [0]]], 5e-5, "it").stops, "NaN is no small difference"
    assert judge(meeting, [[None, [0, 1]], [1e-6, [0, 1]]], 5e-5, "it").state == OK
    assert judge(meeting, [[None, [0]]], 5e-5, "it").stops
