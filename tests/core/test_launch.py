"""`autodeco launch`: the scripts, what they refuse, what they keep secret, and one that runs."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autodeco.cli import main
from autodeco.cli.options import as_words
from autodeco.cluster.environment import (
    HIDDEN,
    forwarded_variables,
    is_secret,
    read_environment_file,
)
from autodeco.errors import UsageError
from autodeco.run_directory import job_values
from autodeco.stories import write_records

JOB = ("--plugin", "qwen3", "--preset", "debug")
SECRET = "not-for-other-eyes"
ENVIRONMENT = f"""
# of the fabric
NCCL_DEBUG=INFO
export UCX_TLS="rc,sm"
OMP_NUM_THREADS=1
GLOO_SOCKET_IFNAME=lo
PHRASE='it is $HOME'
WANDB_API_KEY={SECRET}
MY_PROXY=http://me:{SECRET}@there
"""
VALUES = {
    "NCCL_DEBUG": "INFO",
    "UCX_TLS": "rc,sm",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "PHRASE": "it is $HOME",
    "WANDB_API_KEY": None,
    "MY_PROXY": None,
}


def launched(
    capsys: pytest.CaptureFixture[str], *options: Any, nodes: int = 2, gpus: int = 4
) -> dict[str, Any]:
    capsys.readouterr()
    shape = ("--nodes", str(nodes), "--gpus-per-node", str(gpus))
    main(["launch", *shape, *map(str, options), "--json"])
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


def refused(capsys: pytest.CaptureFixture[str], *options: Any) -> tuple[Any, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["launch", "--nodes", "2", "--gpus-per-node", "4", *map(str, options)])
    shown = capsys.readouterr()
    assert shown.out == "", "nothing is printed before the job is proved possible"
    return ended.value.code, shown.err


@pytest.fixture
def env_file(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.env"
    path.write_text(ENVIRONMENT)
    return path


def in_bash(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-s"], input=script, env=environment, capture_output=True, text=True, timeout=60
    )


# --- what is written


@pytest.mark.parametrize("format", ["torchrun", "sbatch"])
@pytest.mark.parametrize("nodes", [1, 2])
def test_bash_accepts_what_is_written(
    tmp_path: Path,
    env_file: Path,
    capsys: pytest.CaptureFixture[str],
    format: str,
    nodes: int,
) -> None:
    script = tmp_path / "start me.sh"
    told = launched(
        capsys,
        *(*JOB, "--format", format, "--env-file", env_file, "--write", script),
        *("--name", "it's $HOME", "--no-eos-loss", "--chat-template-kwargs", '{"a": "b c"}'),
        nodes=nodes,
    )
    assert script.read_text() == told["script"] and script.stat().st_mode & 0o777 == 0o755
    checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert told["forwarded"] == VALUES
    assert SECRET not in json.dumps(told)
    assert not any(word in told["script"] for word in ("10.", "localhost", "ib0", "eth0"))
    options = shlex.split(told["script"].split("-m autodeco ")[1].split(" || ")[0].split("\n")[0])
    assert options[0] == "run" and options[options.index("--name") + 1] == "it's $HOME"
    assert options[options.index("--chat-template-kwargs") + 1] == '{"a": "b c"}'
    assert "--no-eos-loss" in options and "--learning-rate" not in options


def test_options_become_the_words_that_give_them() -> None:
    given = {"plugin": "x", "eos_loss": False, "copy": True, "chat_template_kwargs": {"a": 1}}
    given |= {"learning_rate": 1e-4, "model": Path("a b")}
    words = as_words(given)
    assert words[:4] == ["--plugin", "x", "--model", "a b"]
    assert {"--no-eos-loss", "--copy", '{"a": 1}', "0.0001"} <= set(words)


def test_people_see_the_script_on_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    main(["launch", "--nodes", "2", "--gpus-per-node", "4", *JOB])
    shown = capsys.readouterr().out
    assert shown.startswith("#!/usr/bin/env bash\n") and "--nproc-per-node 4" in shown
    assert "2 x 4 processes, qwen3 debug, engine hf, layout tp=1" in shown


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layout", "tp=3"), "tp 3 x pp 1 x cp 1 = 3 does not divide 8 processes"),
        (("--layout", "pp=2"), "3 layers do not fit 2 pipeline stages"),
        (("--time-limit", "soon"), "'soon' is no duration"),
        (("--env-file", "nowhere.env"), "cannot read the environment file"),
        (("--config", "nowhere.yaml"), "cannot read the configuration"),
    ],
)
def test_an_impossible_job_prints_no_script(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = refused(capsys, *JOB, *options)
    assert code == 2 and message in said


@pytest.mark.parametrize("line", ["no equals sign", "A B=1", "X=1\nX=2", "MASTER_ADDR=a", "9X=1"])
def test_a_wrong_line_is_named_and_its_value_is_not(tmp_path: Path, line: str) -> None:
    path = tmp_path / "env"
    path.write_text(f"OK=1\n{line}{SECRET}\n")
    with pytest.raises(UsageError) as wrong:
        read_environment_file(path)
    assert str(wrong.value.where).startswith(f"{path}:") and SECRET not in str(wrong.value)


def test_the_script_refuses_what_is_not_set(capsys: pytest.CaptureFixture[str]) -> None:
    path = os.environ["PATH"]
    script = launched(capsys, *JOB)["script"].replace("exec torchrun", "echo torchrun")
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):
        found = {"MASTER_ADDR": "a", "MASTER_PORT": "1", "NODE_RANK": "1", "PATH": path}
        done = in_bash(script, **found)
        assert (
            done.returncode == 0 and "--node-rank 1 --master-addr a --master-port 1" in done.stdout
        )
        del found[name]
        done = in_bash(script, **found)
        assert done.returncode != 0 and name in done.stderr and done.stdout == ""
    slurm = in_bash(script, MASTER_ADDR="a", MASTER_PORT="1", SLURM_NODEID="1", PATH=path)
    assert "--node-rank 1" in slurm.stdout
    other = in_bash(script, **found, NODE_RANK="1", NNODES="3")
    assert other.returncode == 2 and "for 2 machines, not 3" in other.stderr
    batch = launched(capsys, *JOB, "--format", "sbatch")["script"]
    assert "SLURM_JOB_ID: submit this script with sbatch" in in_bash(batch, PATH=path).stderr


# --- Slurm, played by two small programs


@pytest.mark.parametrize("code", [0, 1, 7, 75, 137])
def test_the_batch_script_requeues_itself_exactly_when_it_was_stopped_early(
    tmp_path: Path, env_file: Path, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    played = {
        "scontrol": '[ "$1" = show ] && printf "m1\\nm2\\n" || echo "$@" >> "$LOG"',
        "srun": 'env > "$LOG.env"; while [ "$1" != bash ]; do shift; done; "$@" || exit; '
        f"exit {code}",
        "python": 'echo "$RANK $WORLD_SIZE $LOCAL_RANK $MASTER_ADDR $MASTER_PORT $*" > "$LOG.run"',
    }
    for name, text in played.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    script = launched(capsys, *JOB, "--format", "sbatch", "--env-file", env_file)["script"]
    assert "#SBATCH --signal=USR1@300" in script and "#SBATCH --requeue" in script
    log = tmp_path / "log"
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "LOG": str(log),
        "SLURM_JOB_ID": "41",
        "SLURM_JOB_NODELIST": "m[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "1",
    }
    missing = in_bash(script, **environment)
    assert missing.returncode != 0 and "WANDB_API_KEY: it is a secret" in missing.stderr
    done = in_bash(script, **environment, WANDB_API_KEY=SECRET, MY_PROXY=SECRET)
    assert done.returncode == code, done.stderr
    assert (log.read_text() if log.exists() else "") == ("requeue 41\n" if code == 75 else "")
    ran = (tmp_path / "log.run").read_text()
    assert ran.startswith("5 8 1 m1 20041 -m autodeco run --plugin qwen3")
    lines = (tmp_path / "log.env").read_text().splitlines()
    assert "PHRASE=it is $HOME" in lines and f"WANDB_API_KEY={SECRET}" in lines


# --- what the run records


def test_secrets_are_known_by_their_name_or_their_address() -> None:
    assert all(map(is_secret, ("HF_TOKEN", "aws_secret_x", "DB_PASSWORD", "WANDB_API_KEY")))
    assert is_secret("X", "https://user:word@host/path") and not is_secret("X", "https://host/a")
    assert not any(map(is_secret, ("NCCL_SOCKET_IFNAME", "OMP_NUM_THREADS")))
    found = {
        "AUTODECO_FORWARDED": "A,HF_TOKEN,GONE,B:secret",
        "A": "1",
        "HF_TOKEN": SECRET,
        "B": "2",
    }
    assert forwarded_variables(found) == {"A": "1", "HF_TOKEN": HIDDEN, "GONE": None, "B": HIDDEN}
    assert forwarded_variables({}) == {}


def test_the_line_runs_on_this_machine(
    tmp_path: Path, env_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script, held_out = tmp_path / "start.sh", tmp_path / "held_out.jsonl"
    write_records(held_out, 1, "heldout", 4)
    options = (*JOB, "--env-file", env_file, "--write", script, "--eval-data", held_out)
    short = ("--task-samples", 8, "--max-steps", 2, "--global-batch", 4, "--device", "cpu")
    late = ("--evaluate-problems", 1, "--max-new-tokens", 2, "--merge", "none", "--out", "runs")
    launched(capsys, *options, *short, *late, nodes=1, gpus=2)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [str(script)],
        env={**os.environ, "PATH": path, "WANDB_API_KEY": SECRET, "MY_PROXY": SECRET},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = (tmp_path / "runs").glob("*/*")
    assert (run / "stages" / "evaluate.json").exists()
    job = json.loads((run / "job.json").read_text())
    assert job["environment"] == {name: value or HIDDEN for name, value in VALUES.items()}
    assert "environment" not in job_values(job)
    for rank in (0, 1):
        log = (run / "logs" / f"rank-{rank}.log").read_text()
        assert f"begin: rank {rank}, host" in log and "train ends after" in log
        assert log.rstrip().endswith("autodeco: end")
    assert not any(SECRET in p.read_text(errors="replace") for p in run.rglob("*.*") if p.is_file())
