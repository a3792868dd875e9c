"""``context/`` of a NeMo 2 checkpoint, written by NeMo itself in an environment of its own.

NeMo pins another transformers, so it is spoken with by files: `nemo_context_script` runs under
NeMo's Python. What it wrote is never unpickled here.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from autodeco.convert import nemo_context_script
from autodeco.errors import AutodecoError, EnvironmentProblem, WeightsError
from autodeco.family import Architecture, ModelShape
from autodeco.files import atomic_directory, atomic_write_json, read_object

CONTEXT = "context"
_FILES = ("io.json", "model.yaml")
_SECONDS = 900.0  # importing NeMo from a network disk takes minutes
_TAIL = 600  # characters of what NeMo said last
_GUIDE = "make NeMo's environment with requirements/nemo.txt (docs/nemo.md)"
# of a launcher: one process runs there, and meets no other
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LAUNCHERS = ("SLURM_", "TORCHELASTIC_", "PYTHON")


def write_context(
    python: Path,
    model: Path,
    architecture: Architecture,
    shape: ModelShape,
    checkpoint: Path,
    *,
    seconds: float = _SECONDS,
) -> dict[str, Any]:
    """Writes ``context/`` beside the ``weights/`` of an imported checkpoint.

    Args:
        python: NeMo's Python.
        model: The Hugging Face directory that the checkpoint was imported from.
        architecture: Its architecture; `Architecture.nemo` names NeMo's importer.
        shape: Its sizes, which NeMo's configuration gets.
        checkpoint: The imported checkpoint.
        seconds: NeMo is given so long.

    Returns:
        `changed`, sizes that NeMo's importer would have had otherwise, and `versions`.

    Raises:
        WeightsError: NeMo has no such architecture, or refuses the directory.
        EnvironmentProblem: The Python cannot be run, lacks NeMo, or does not end.
    """
    check_python(python, architecture)
    with tempfile.TemporaryDirectory() as place:
        answer = Path(place, "answer.json")
        request = {
            "importer": architecture.nemo,
            "model": str(model.resolve()),
            "sizes": nemo_sizes(shape),
            "answer": str(answer),
        }
        with atomic_directory(checkpoint / CONTEXT) as temporary:
            request["output"] = str(temporary.resolve())
            atomic_write_json(Path(place, "request.json"), request)
            said = _run(python, Path(place, "request.json"), seconds)
            found = _answer(python, answer, said)
            _check_written(temporary, python)
    return found


def check_python(python: Path, architecture: Architecture) -> None:
    """Checks, before anything is written, that a context can be asked for.

    Raises:
        WeightsError: NeMo has no such architecture.
        EnvironmentProblem: The Python is none that can be run.
    """
    if not architecture.nemo:
        raise WeightsError(
            f"the plugin names no importer of NeMo for {architecture.name}",
            where="--nemo-python",
            fix="leave --nemo-python out: weights/ is written without NeMo",
        )
    if not (python.is_file() and os.access(python, os.X_OK)):
        raise EnvironmentProblem(
            "this is no program that can be run",
            where=f"--nemo-python {python}",
            fix=_GUIDE + " and give the path of its bin/python",
        )


def nemo_sizes(shape: ModelShape) -> dict[str, int]:
    """Returns fields of NeMo's configuration that a checkpoint's sizes decide."""
    sizes = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_heads,
        "num_query_groups": shape.num_kv_heads,
        "vocab_size": shape.vocab_size,
    }
    if shape.ffn_size:
        sizes["ffn_hidden_size"] = shape.ffn_size
    if not shape.is_latent:  # there it is another width, which nothing depends on
        sizes["kv_channels"] = shape.head_dim
    if shape.num_experts:
        sizes |= {
            "num_moe_experts": shape.num_experts,
            "moe_router_topk": shape.experts_per_token,
            "moe_ffn_hidden_size": shape.expert_ffn_size,
        }
    return sizes


def _run(python: Path, request: Path, seconds: float) -> str:
    """Runs the script; returns the end of what it said."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCHER and not name.startswith(_LAUNCHERS)
    } | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    command = [str(python), "-W", "ignore", str(Path(nemo_context_script.__file__)), str(request)]
    try:
        ended = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise EnvironmentProblem(
            f"NeMo's Python did not end within {seconds:g} s",
            where=f"--nemo-python {python}",
            fix="run the same command again: weights/ is kept",
        ) from error
    except OSError as error:
        raise EnvironmentProblem(
            f"NeMo's Python cannot be run: {error.strerror}",
            where=f"--nemo-python {python}",
            fix=_GUIDE,
        ) from error
    said = ended.stdout.decode(errors="replace").strip()[-_TAIL:]
    return f"exit status {ended.returncode}" + (f": {said}" if said else "")


def _answer(python: Path, path: Path, said: str) -> dict[str, Any]:
    """Returns the script's answer, or raises what it says went wrong."""
    where = f"--nemo-python {python}"
    if not path.exists():
        raise EnvironmentProblem(f"NeMo's Python gave no answer ({said})", where=where, fix=_GUIDE)
    answer = read_object(path)
    problem = answer.get("error")
    if problem is None:
        return answer
    kind: type[AutodecoError] = WeightsError
    fix = "use a model directory that this NeMo reads; its transformers is older than autodeco's"
    if answer.get("kind") == "environment":
        kind, fix = EnvironmentProblem, _GUIDE
    raise kind(f"NeMo does not write the context: {problem}", where=where, fix=fix)


def _check_written(directory: Path, python: Path) -> None:
    for name in _FILES:
        path = directory / name
        if not path.is_file() or not path.stat().st_size:
            raise EnvironmentProblem(
                f"NeMo's Python wrote no {CONTEXT}/{name}",
                where=f"--nemo-python {python}",
                fix=_GUIDE,
            )
    read_object(directory / _FILES[0])


__all__ = ["CONTEXT", "check_python", "nemo_sizes", "write_context"]
