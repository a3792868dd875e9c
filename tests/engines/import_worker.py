"""One rank of `test_import`: `import_worker.py WHAT JSON`, with RANK and WORLD_SIZE set."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from autodeco.convert import stored_writer
from autodeco.convert.source import open_source
from autodeco.engines.megatron import importing
from autodeco.engines.megatron.importing import import_checkpoint
from autodeco.engines.select import build_engine
from autodeco.family import FamilySpec
from autodeco.hookspecs import ImportedWeights
from autodeco.job import Job
from autodeco_plugin_qwen3.family import FAMILY


def family_of(shape: dict[str, Any] | None) -> FamilySpec:
    """The family, its debug preset with other sizes if `shape` has any."""
    preset = FAMILY.preset("debug")
    sizes = dataclasses.replace(preset.shape, **(shape or {}))
    others = tuple(p for p in FAMILY.presets if p.name != "debug")
    return dataclasses.replace(FAMILY, presets=(dataclasses.replace(preset, shape=sizes), *others))


def job_of(model: str, preset: str, **changes: Any) -> Job:
    values = {"device": "cpu", "dtype": "float32", "engine": "megatron", **changes}
    return Job(plugin="qwen3", preset=preset, model=Path(model), **values)


def bytes_of(model: Any) -> dict[str, bytes]:
    return {n: p.detach().contiguous().numpy().tobytes() for n, p in model.named_parameters()}


def write(options: dict[str, Any]) -> dict[str, Any]:
    """Imports; `kill_at`: ends at once when this piece, `kill_at_part`: this part is begun."""
    if "kill_at_part" in options:
        whole, begun = importing.write_part, iter(range(10**6))

        def write_part(*arguments: Any) -> Any:
            if next(begun) == options["kill_at_part"]:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(*arguments)

        importing.write_part = write_part  # type: ignore[assignment]
    if "kill_at" in options:
        plain, asked = stored_writer.PieceSource.read, iter(range(10**6))

        def read(self: Any, piece: Any) -> Any:
            if next(asked) == options["kill_at"]:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(self, piece)

        stored_writer.PieceSource.read = read  # type: ignore[method-assign]
    family = family_of(options.get("shape"))
    weights = open_source(family, job_of(options["model"], options["preset"]))
    architecture = family.architecture(family.preset(options["preset"]).architecture)
    limits = {name: options[name] for name in ("part_bytes", "held_bytes") if name in options}
    with PeakMemory() as peak:
        import_checkpoint(weights, architecture, Path(options["output"]), **limits)
    return {"grown": peak.grown}


_WATCH = """
import select, sys
most = 0
print("ready", flush=True)
while not select.select([sys.stdin], [], [], 0.001)[0]:
    status = open(f"/proc/{sys.argv[1]}/status").read()
    most = max(most, int(status.split("RssAnon:")[1].split()[0]))
print(most * 1024)
"""


class PeakMemory:
    """How much anonymous memory this process has at most, beyond what it had at the beginning.

    Another process looks, every millisecond: a thread would miss what happens without the GIL.
    """

    def __enter__(self) -> PeakMemory:
        status = Path("/proc/self/status").read_text()
        self._before = int(status.split("RssAnon:")[1].split()[0]) * 1024
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, "-c", _WATCH, str(os.getpid())]
        self._watch = subprocess.Popen(command, **pipes)
        assert self._watch.stdout is not None
        assert self._watch.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_: object) -> None:
        self.grown = int(self._watch.communicate("")[0]) - self._before


def compare(options: dict[str, Any]) -> list[dict[str, Any]]:
    """Loads each layout in three ways; reports which parameters differ."""
    from megatron.core import dist_checkpointing

    reports = []
    for preset, layout in options["cases"]:
        model = f"{options['root']}/{preset}"
        imported = Path(options["root"], f"{preset}-imported")
        job = job_of(model, preset, layout=layout)
        direct = build_engine(job, open_source(FAMILY, job), FAMILY)._model  # type: ignore[attr-defined]
        expected = bytes_of(direct)
        weights: ImportedWeights = dataclasses.replace(
            open_source(FAMILY, job), format="torch_dist", distributed=imported
        )
        ours = bytes_of(build_engine(job, weights, FAMILY)._model)  # type: ignore[attr-defined]
        with torch.no_grad():
            for parameter in direct.parameters():
                parameter.fill_(7.0)
        state = dist_checkpointing.load(
            direct.sharded_state_dict(prefix="module."), str(imported / "weights")
        )
        direct.load_state_dict({k.removeprefix("module."): v for k, v in state.items()})
        theirs = bytes_of(direct)
        reports.append(
            {
                "case": f"{preset} {layout}",
                "parameters": len(expected),
                "ours": [n for n in expected if ours[n] != expected[n]],
                "theirs": [n for n in expected if theirs[n] != expected[n]],
            }
        )
    return reports


def plain(options: dict[str, Any]) -> dict[str, Any]:
    """A plain GPTModel, loaded by megatron-core: logits, and what it saves itself."""
    from megatron.core import dist_checkpointing
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.tensor_parallel.random import initialize_rng_tracker
    from transformers import AutoModelForCausalLM

    from autodeco.engines.megatron.compat import apply_cures
    from autodeco.engines.megatron.engine import form_groups
    from autodeco.engines.megatron.settings import transformer_config
    from autodeco.layout import ParallelLayout

    cpu, layout = torch.device("cpu"), ParallelLayout()
    apply_cures()
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]  # megatron-core's save
    form_groups(layout, cpu)
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)  # dropout asks for it
    preset = FAMILY.preset(options["preset"])
    path = Path(options["root"], preset.name)
    config = json.loads((path / "config.json").read_text())
    architecture = FAMILY.architecture(preset.architecture)
    settings = transformer_config(preset.shape, architecture, config, layout, torch.float32, cpu)
    spec = get_gpt_decoder_block_spec(settings, use_transformer_engine=False)
    model = GPTModel(
        settings,
        spec,
        vocab_size=preset.shape.vocab_size,
        max_sequence_length=1,
        share_embeddings_and_output_weights=preset.shape.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=config["rope_parameters"]["rope_theta"],
    ).eval()
    asked = model.sharded_state_dict(prefix="module.")
    state = dist_checkpointing.load(asked, options["weights"])
    model.load_state_dict({k.removeprefix("module."): v for k, v in state.items()})
    ids = torch.randint(0, preset.shape.vocab_size, (2, 24))
    positions = torch.arange(24).expand(2, -1)
    mask = torch.ones(1, 1, 24, 24).triu(1).bool()
    with torch.no_grad():
        mine = model(ids, positions, mask)
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
    saved = Path(options["root"], f"{preset.name}-saved-by-megatron")
    saved.mkdir()
    dist_checkpointing.save(model.sharded_state_dict(prefix="module."), str(saved))
    return {"difference": float((mine - theirs).abs().max()), "saved": str(saved)}


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    what, options = sys.argv[1], json.loads(sys.argv[2])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world > 1:
        meeting = f"file://{options['meeting']}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    report = {"write": write, "compare": compare, "plain": plain}[what](options)
    Path(f"{options['report']}.{rank}").write_text(json.dumps(report))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
