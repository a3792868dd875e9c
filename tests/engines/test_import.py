"""`autodeco import`: the checkpoint is megatron-core's own, complete, exact, bounded, resumable."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from import_worker import family_of
from torch.distributed.checkpoint import FileSystemReader

from autodeco.cli import main
from autodeco.convert import stored_writer
from autodeco.convert.importing import ready_weights
from autodeco.convert.random_checkpoint import write_random_checkpoint
from autodeco.convert.stored import MANIFEST, read_manifest, verify
from autodeco.convert.stored_reader import StoredReader
from autodeco.convert.workers import default_workers
from autodeco.engines.select import choose_engine
from autodeco.errors import EnvironmentProblem, UsageError, WeightsError
from autodeco.job import Job
from autodeco.lock import file_lock
from autodeco.safetensors_header import read_checkpoint
from autodeco_plugin_qwen3.family import FAMILY

WORKER = Path(__file__).with_name("import_worker.py")
PRESETS = ("debug", "debug-moe")
PART = 60_000  # bytes: many parts
ONE = (("debug", "tp=1"), ("debug-moe", "tp=1"))
TWO = (
    ("debug", "tp=2"),
    ("debug", "pp=2,first=2,last=1"),
    ("debug", "tp=1"),
    ("debug-moe", "ep=2"),
    ("debug-moe", "tp=2"),
    ("debug-moe", "pp=2"),
)
FOUR = (
    ("debug", "tp=2,pp=2,first=1,last=2"),
    ("debug-moe", "tp=2,ep=2"),
    ("debug-moe", "pp=2,ep=2"),
    ("debug-moe", "tp=2,pp=2"),
)
_NUMBER = itertools.count()


def run(place: Path, what: str, world: int = 1, code: int = 0, **options: Any) -> list[Any]:
    """Runs the worker on `world` ranks; returns their reports."""
    name = f"{what}-{next(_NUMBER)}"
    options |= {"meeting": str(place / f"{name}.meeting"), "report": str(place / name)}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, what, json.dumps(options, default=str)],
            env={**environment, "RANK": str(rank), "WORLD_SIZE": str(world)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [p.returncode for p in processes] == [code] * world, errors[0][-3000:]
    if code:
        return []
    return [json.loads(Path(f"{options['report']}.{rank}").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random checkpoints, and what two ranks make of them."""
    place = tmp_path_factory.mktemp("import")
    for preset in PRESETS:
        model = write_random_checkpoint(FAMILY, FAMILY.preset(preset), place / preset)
        output = place / f"{preset}-imported"
        run(place, "write", 2, model=model, preset=preset, output=output, part_bytes=PART)
    return place


def job_of(root: Path, preset: str, **changes: Any) -> Job:
    values = {"import_format": "torch_dist", "engine": "megatron", "device": "cpu", **changes}
    return Job(plugin="qwen3", preset=preset, model=root / preset, **values)


@pytest.mark.parametrize(
    ("world", "cases"), [(1, ONE), (2, TWO), pytest.param(4, FOUR, marks=pytest.mark.slow)]
)
def test_every_layout_loads_the_same_bytes(root: Path, world: int, cases: Any) -> None:
    """By our reader and by megatron-core's, against the Hugging Face directory itself."""
    for rank, report in enumerate(run(root, "compare", world, root=root, cases=cases)):
        for case in report:
            who = f"rank {rank}, {case['case']}"
            assert case["parameters"] > 8, who
            assert not case["ours"], f"{who}: our reader gives other {case['ours'][0]}"
            assert not case["theirs"], f"{who}: megatron-core reads other {case['theirs'][0]}"


@pytest.mark.parametrize("preset", PRESETS)
def test_a_plain_model_loads_it_and_saves_the_same_keys(root: Path, preset: str) -> None:
    weights = root / f"{preset}-imported" / "weights"
    (report,) = run(root, "plain", root=root, preset=preset, weights=weights)
    assert report["difference"] < 5e-5
    ours = FileSystemReader(weights).read_metadata().state_dict_metadata
    theirs = FileSystemReader(report["saved"]).read_metadata().state_dict_metadata
    of_te = {key for key in ours.keys() - theirs.keys() if "norm._extra_state/" not in key}
    # what NeMo's records say of these: tests/nemo
    norms = {"module.decoder.layers.pre_mlp_layernorm.weight"} if "moe" in preset else set()
    tied = set() if "moe" in preset else {"module.output_layer.weight"}
    assert of_te == norms | tied
    assert theirs.keys() <= ours.keys()
    for key, entry in theirs.items():
        if hasattr(entry, "size"):
            assert ours[key].size == entry.size, key
            assert ours[key].properties.dtype == entry.properties.dtype, key
            assert _chunks(ours[key]) == _chunks(entry), key


def _chunks(entry: Any) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    return {(tuple(c.offsets), tuple(c.sizes)) for c in entry.chunks}


@pytest.mark.parametrize("preset", PRESETS)
def test_nothing_of_this_machine_is_in_the_files(root: Path, preset: str) -> None:
    output = root / f"{preset}-imported"
    assert {p.name for p in output.iterdir()} == {"weights", "hf", MANIFEST}
    assert not list(root.glob(f".{output.name}*"))
    for path in output.rglob("*"):
        assert path.is_dir() or str(root).encode() not in path.read_bytes(), path


def test_one_rank_writes_what_two_write(root: Path) -> None:
    output = root / "alone"
    options = {"model": root / "debug", "preset": "debug", "part_bytes": PART}
    run(root, "write", output=output, **options)
    manifest = read_manifest(output)
    assert manifest.parts == read_manifest(root / "debug-imported").parts
    assert len(manifest.parts) > 3


def test_a_killed_import_goes_on_where_it_stopped(root: Path) -> None:
    output, options = root / "killed", {"preset": "debug", "part_bytes": PART}
    options |= {"model": root / "debug", "output": output}
    run(root, "write", code=-9, kill_at_part=4 + default_workers(), **options)
    assert not output.exists()
    building = root / ".killed.import"
    done = sorted(int(p.stem) for p in (building / "parts").glob("*.json"))
    assert len(done) > 1
    stamps = {n: (building / "result" / "weights" / f"__{n}_0.distcp").stat() for n in done}
    torn = building / "result" / "weights" / f"__{done[0]}_0.distcp"
    torn.write_bytes(torn.read_bytes()[:-1])  # as if the disk had lost it
    run(root, "write", 2, **options)
    assert read_manifest(output).parts == read_manifest(root / "debug-imported").parts
    verify(output, read_manifest(output))
    after = {n: (output / "weights" / f"__{n}_0.distcp").stat() for n in done}
    same = [after[n].st_mtime_ns == stamps[n].st_mtime_ns for n in done]
    assert same == [False] + [True] * (len(done) - 1)
    assert not building.exists() and not list(output.rglob(".*.partial"))


def test_bug_two_imports_into_one_directory_were_not_kept_apart(root: Path, tmp_path: Path) -> None:
    output = tmp_path / "imported"
    command = [sys.executable, "-m", "autodeco", "import", "--plugin", "qwen3", "--preset", "debug"]
    command += ["--model", str(root / "debug"), "--format", "torch_dist", "--output", str(output)]
    held = file_lock(tmp_path / ".imported.lock", "the import", output, "wait")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode != 0 and not output.exists()
    assert f"the import is in use by process {os.getpid()}" in done.stderr
    assert "wait for it" in done.stderr and "Traceback" not in done.stderr
    held.release()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    verify(output, read_manifest(output))
    assert [path.name for path in tmp_path.iterdir()] == ["imported"]


def test_the_work_of_another_source_is_not_continued(root: Path, tmp_path: Path) -> None:
    model = write_random_checkpoint(FAMILY, FAMILY.preset("debug"), tmp_path / "debug")
    options = {"preset": "debug", "part_bytes": PART, "output": tmp_path / "out"}
    run(tmp_path, "write", code=-9, kill_at=12, model=model, **options)
    other = write_random_checkpoint(FAMILY, FAMILY.preset("debug"), tmp_path / "other", seed=1)
    run(tmp_path, "write", model=other, **options)
    with StoredReader(tmp_path / "out") as ours, StoredReader(root / "debug-imported") as old:
        for name in ("embedding.word_embeddings.weight", "decoder.final_layernorm.weight"):
            assert not torch.equal(ours.read(name), old.read(name))
    with pytest.raises(WeightsError, match="another checkpoint"):
        ready_weights(FAMILY, job_of(root, "debug", import_dir=tmp_path / "out"))


def test_memory_is_bounded_by_what_may_be_held_and_three_source_tensors(tmp_path: Path) -> None:
    shape = {
        "num_layers": 8,
        "hidden_size": 1024,
        "num_heads": 16,
        "num_kv_heads": 8,
        "head_dim": 64,
        "ffn_size": 3072,
        "vocab_size": 16384,
    }
    preset = family_of(shape).preset("debug")
    model = write_random_checkpoint(FAMILY, preset, tmp_path / "model")
    sizes = [info.size for info in read_checkpoint(model).values()]
    limits = {"part_bytes": 64 << 20, "held_bytes": 48 << 20}
    options = {"shape": shape, "model": model, "preset": "debug", **limits}
    (report,) = run(tmp_path, "write", output=tmp_path / "out", **options)
    limit = limits["held_bytes"] + 3 * max(sizes) + (24 << 20)
    assert report["grown"] < limit < sum(sizes) / 1.5


def test_a_full_disk_is_said_and_the_same_command_goes_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        plain, space = stored_writer._SummedStream, itertools.count()

        class Full(plain):  # type: ignore[misc, valid-type]
            def __init__(self, stream: Any) -> None:
                super().__init__(SimpleNamespace(write=self._limited))
                self._inner = stream

            def _limited(self, data: Any) -> int:
                if next(space) > 40:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return int(self._inner.write(data))

        patch.setattr(stored_writer, "_SummedStream", Full)
        with pytest.raises(EnvironmentProblem, match="No space left"):
            ready_weights(FAMILY, job_of(root, "debug", import_dir=output))
    assert not output.exists() and not list(tmp_path.rglob("*.distcp"))
    assert ready_weights(FAMILY, job_of(root, "debug", import_dir=output)).distributed == output


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [(damage, "the file is damaged: '"), (cut, "bytes, written were"), (Path.unlink, "missing")],
)
def test_a_damaged_part_is_found(
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None],
    message: str,
) -> None:
    command = ["import", "--plugin", "qwen3", "--preset", "debug", "--model", str(root / "debug")]
    command += ["--format", "torch_dist", "--output", str(tmp_path / "out")]
    main(command)
    main(command)
    assert "was there, and is intact" in capsys.readouterr().out
    change(next((tmp_path / "out" / "weights").glob("*.distcp")))
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == WeightsError.exit_code
    assert message in capsys.readouterr().err


def test_the_manifest_says_what_is_ours(root: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    with pytest.raises(WeightsError, match="no imported checkpoint"):
        ready_weights(FAMILY, job_of(root, "debug", import_dir=foreign))
    manifest = read_manifest(root / "debug-imported").to_json()
    (foreign / MANIFEST).write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(WeightsError, match="version 99"):
        read_manifest(foreign)
    manifest["files"] = {"../../etc/passwd": {"size": 1, "crc32": 0}}
    (foreign / MANIFEST).write_text(json.dumps({**manifest, "parts": []}))
    with pytest.raises(WeightsError, match="leads outside the directory"):
        read_manifest(foreign)


def test_layers_of_several_dtypes_are_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = write_random_checkpoint(FAMILY, FAMILY.preset("debug"), tmp_path / "debug")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({**tensors, name: tensors[name].half()}, model / "model.safetensors")
    with pytest.raises(WeightsError, match="layers differ in their dtype"):
        ready_weights(FAMILY, job_of(tmp_path, "debug", import_dir=tmp_path / "out"))
    assert not list(tmp_path.glob("*out*"))


def test_the_hf_engine_refuses_it_and_auto_takes_megatron(root: Path) -> None:
    preset = FAMILY.preset("debug")
    with pytest.raises(UsageError, match="imports torch_dist"):
        choose_engine(job_of(root, "debug", engine="hf"), preset, 1)
    assert choose_engine(job_of(root, "debug", engine="auto"), preset, 1)[0] == "megatron"
    plain = dataclasses.replace(job_of(root, "debug", engine="auto"), import_format="hf")
    assert choose_engine(plain, preset, 1)[0] == "hf"


def test_a_run_can_import_and_goes_on_with_it(tmp_path: Path) -> None:
    command = ["--plugin", "qwen3", "--preset", "debug", "--device", "cpu", "--out", str(tmp_path)]
    command += ["--task-samples", "16", "--max-steps", "1", "--import-format", "torch_dist"]
    main(["train", *command])
    (path,) = (tmp_path / "qwen3-debug").iterdir()
    recorded = json.loads((path / "stages" / "import.json").read_text())
    assert recorded["format"] == "torch_dist"
    verify(path / "imported", read_manifest(path / "imported"))
    main(["export", *command])
    assert (path / "heads" / "model.safetensors").exists()


def test_a_dry_run_says_what_an_import_writes(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["import", "--model", str(root / "debug-moe"), "--format", "torch_dist"]
    command += ["--output", str(tmp_path / "out"), "--json"]
    main([*command, "--dry-run"])
    planned = json.loads(capsys.readouterr().out)
    assert not list(tmp_path.iterdir())
    main(command)
    manifest = read_manifest(tmp_path / "out")
    pieces = [written for part in manifest.parts for written in part.pieces]
    found = {
        "pieces": len(pieces),
        "parts": len(manifest.parts),
        "size": sum(written.size for written in pieces),
        "keys": len({key for w in pieces for key in (w.piece.key, *w.piece.aliases)}),
    }
    assert {name: int(planned[name]) for name in found} == found
