"""Writes the cases into a directory and imports them: `import_worker.py DIR`."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from cases import CASES

from autodeco.convert.source import open_source
from autodeco.engines.megatron.importing import import_checkpoint
from autodeco.job import Job


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    for case in CASES.values():
        model = case.write(place / case.name)
        job = Job(plugin=case.family.id, preset=case.preset_name, model=model, device="cpu")
        architecture = case.family.architecture(case.preset.architecture)
        output = place / f"{case.name}-imported"
        import_checkpoint(open_source(case.family, job), architecture, output)


if __name__ == "__main__":
    main()
