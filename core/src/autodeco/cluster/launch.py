"""What each machine runs for a job: a torchrun script, or one for Slurm's sbatch.

Nothing of one cluster is in a script: addresses, ports and numbers of machines are variables that
the machines or Slurm set; where one is missing the script ends and says so.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from autodeco.cluster.environment import FORWARDED, SECRET_MARK, ForwardedVariable
from autodeco.errors import EXIT_CODES, StoppedEarly

FORMATS = ("torchrun", "sbatch")
REQUEUE = StoppedEarly.exit_code


@dataclass(frozen=True)
class Launch:
    """What is to be started.

    Attributes:
        nodes: Machines.
        processes: Processes, one a GPU, on each machine.
        command: ``run`` and its options, as words.
        title: What it is, for people.
        variables: Forwarded to every process.
        name: The job's name in the queue.
        on_gpus: Whether to ask for GPUs.
        signal_seconds: Slurm's warning comes so long before its time limit.
    """

    nodes: int
    processes: int
    command: tuple[str, ...]
    title: str
    variables: tuple[ForwardedVariable, ...] = ()
    name: str = "autodeco"
    on_gpus: bool = True
    signal_seconds: int = 300

    def script(self, format: str) -> str:
        """Returns the script, a shell's whole program."""
        body = _torchrun(self) if format == "torchrun" else _sbatch(self)
        return "\n".join(["#!/usr/bin/env bash", *body]) + "\n"


def _torchrun(launch: Launch) -> list[str]:
    if launch.nodes == 1:
        meeting = ["--standalone"]
        checks: list[str] = []
    else:
        first, port = "the first machine", "a free port there"
        checks = [
            ': "${MASTER_ADDR:?set it to the address of ' + first + '}"',
            ': "${MASTER_PORT:?set it to ' + port + '}"',
            'NODE_RANK="${NODE_RANK:-${SLURM_NODEID:?set NODE_RANK to 0 on '
            + first
            + ', then 1, 2, ...}}"',
            *_same_number("${NNODES:-${SLURM_NNODES:-" + str(launch.nodes) + "}}", launch.nodes),
        ]
        meeting = [
            f"--nnodes {launch.nodes}",
            '--node-rank "$NODE_RANK"',
            '--master-addr "$MASTER_ADDR"',
            '--master-port "$MASTER_PORT"',
        ]
    words = ["exec torchrun", *meeting, f"--nproc-per-node {launch.processes}"]
    return [
        f"# {launch.title}",
        "# Run this on the machine." if launch.nodes == 1 else "# Run this on each machine.",
        "set -euo pipefail",
        *checks,
        *_exports(launch.variables),
        _continued([*words, "-m autodeco " + shlex.join(launch.command)]),
    ]


def _sbatch(launch: Launch) -> list[str]:
    options = [
        "--job-name=" + re.sub(r"[^\w.-]", "-", launch.name),
        f"--nodes={launch.nodes}",
        f"--ntasks-per-node={launch.processes}",
        *([f"--gpus-per-node={launch.processes}"] if launch.on_gpus else []),
        f"--signal=USR1@{launch.signal_seconds}",  # to the steps' processes, not to this shell
        "--requeue",
        "--open-mode=append",
    ]
    step = ["srun --kill-on-bad-exit=0 --wait=0", '--cpus-per-task="${SLURM_CPUS_PER_TASK:-1}"']
    return [
        *(f"#SBATCH {option}" for option in options),
        f"# {launch.title}",
        "# Partition, account, --time and --cpus-per-task are your cluster's: give them to sbatch.",
        "set -euo pipefail",
        ': "${SLURM_JOB_ID:?submit this script with sbatch}" "${SLURM_JOB_NODELIST:?}"',
        *_same_number("${SLURM_NNODES:?}", launch.nodes),
        'nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        "export MASTER_ADDR=\"${MASTER_ADDR:-${nodes%%$'\\n'*}}\"",
        'export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"',
        *_exports(launch.variables),
        "# One task a process, without torchrun: signals and exit codes go through unchanged.",
        'start=\'export RANK="${SLURM_PROCID:?}" WORLD_SIZE="${SLURM_NTASKS:?}"',
        'export LOCAL_RANK="${SLURM_LOCALID:?}"',
        'exec "$@"\'',
        "code=0",
        _continued(
            [
                *step,
                'bash -c "$start" autodeco python -m autodeco ' + shlex.join(launch.command),
            ]
        )
        + " || code=$?",
        f"# {REQUEUE}: {EXIT_CODES[REQUEUE]}",
        f'if [ "$code" -eq {REQUEUE} ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
        'exit "$code"',
    ]


def _same_number(found: str, nodes: int) -> list[str]:
    """The layout was proved for a number of machines; another one is refused."""
    return [
        f'if [ "{found}" != {nodes} ]; then',
        f'    echo "this script is for {nodes} machines, not {found}" >&2',
        "    exit 2",
        "fi",
    ]


def _exports(variables: Sequence[ForwardedVariable]) -> list[str]:
    """Exports values; a secret must already be there, and the script has its name alone."""
    lines = [
        f"export {v.name}={shlex.quote(v.value)}"
        if v.value is not None
        else f'export {v.name}="${{{v.name}:?it is a secret: set it where you start this}}"'
        for v in variables
    ]
    names = ",".join(v.name if v.value is not None else v.name + SECRET_MARK for v in variables)
    return [*lines, f"export {FORWARDED}={names}"] if variables else []


def _continued(parts: Sequence[str]) -> str:
    return " \\\n    ".join(parts)
