"""NeMo reads a checkpoint: `read_worker.py SPEC CHECKPOINT REPORT [TRANSFORMER_ENGINE]`.

It runs in NeMo's environment, without a GPU, with what tools/record_nemo_keys.py replaces for that.
The report says of every parameter of NeMo's model the sha256 of what NeMo read into it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import record_nemo_keys
import torch


def read(checkpoint: Path) -> Any:
    """Returns the model of ``context/``, its weights those of ``weights/``; NeMo does both."""
    from nemo.lightning import io

    model, _ = io.ModelConnector(str(checkpoint)).nemo_load(checkpoint, cpu=True)
    return model


def main() -> None:
    spec, checkpoint, report, *engine = sys.argv[1:]
    record_nemo_keys.prepare(spec, Path(engine[0]) if engine else None)
    with torch.no_grad():
        found = {}
        for name, value in read(Path(checkpoint)).module.state_dict().items():
            if isinstance(value, torch.Tensor) and not name.endswith("_extra_state"):
                raw = value.to(torch.bfloat16).contiguous().view(-1).view(torch.uint8)
                found[name] = hashlib.sha256(raw.numpy().data).hexdigest()
    Path(report).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
