"""What NeMo 2 stores of a model, the import stores too: keys, shapes, dtypes, bytes.

The records in keys/ are NeMo's (tools/record_nemo_keys.py); NeMo is not needed here.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from cases import CASES, KEYS
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

RECORDS = {path.stem: json.loads(path.read_text()) for path in sorted(KEYS.glob("*.json"))}
# deepseek_v3.local: NeMo cannot build it (megatron-core's local attention refuses latent attention)
EXPECTED = {f"{case}.{spec}" for case in CASES for spec in ("te", "local")} - {"deepseek_v3.local"}
_IMPORT = Path(__file__).with_name("import_worker.py")


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Case -> its checkpoint, imported."""
    place = tmp_path_factory.mktemp("nemo")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run([sys.executable, _IMPORT, place], env=environment, check=True, timeout=300)
    return {name: place / f"{name}-imported" for name in CASES}


@pytest.fixture(scope="module")
def stored(imported: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Case -> key -> tensor, or None for an object."""
    found: dict[str, dict[str, Any]] = {}
    for case, directory in imported.items():
        reader = dcp.FileSystemReader(directory / "weights")
        metadata = reader.read_metadata().state_dict_metadata
        tensors = {k: v for k, v in metadata.items() if isinstance(v, TensorStorageMetadata)}
        state = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in tensors.items()}
        dcp.load(state, storage_reader=reader, no_dist=True)
        found[case] = {key: state.get(key) for key in metadata}
    return found


def test_every_case_is_recorded() -> None:
    assert RECORDS.keys() == EXPECTED
    for record in RECORDS.values():
        assert record["versions"]["nemo_toolkit"] == "2.7.3"
        assert len(record["entries"]) > 20


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_the_import_has_what_nemo_has(name: str, stored: dict[str, dict[str, Any]]) -> None:
    record, ours = RECORDS[name], stored[RECORDS[name]["case"]]
    assert not record["entries"].keys() - ours.keys()
    for key, entry in record["entries"].items():
        tensor = ours[key]
        if "object" in entry:
            assert tensor is None, key
            continue
        assert list(tensor.shape) == entry["shape"], key
        if record["spec"] == "local" and "norm" in key:
            # the local spec's norms are float32 whatever the model is; loading converts
            assert entry["dtype"] == "float32", key
            continue
        assert str(tensor.dtype) == "torch." + entry["dtype"], key


@pytest.mark.parametrize("name", sorted(n for n in EXPECTED if n.endswith(".te")))
def test_the_bytes_are_those_of_nemos_own_importer(
    name: str, stored: dict[str, dict[str, Any]]
) -> None:
    record, ours = RECORDS[name], stored[RECORDS[name]["case"]]
    compared = 0
    for key, entry in record["entries"].items():
        if "object" in entry:
            continue
        tensor = ours[key]
        if key.endswith("router.expert_bias"):
            # NeMo reads it through transformers, which rounds it; the import keeps float32
            tensor = tensor.bfloat16().float()
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        assert hashlib.sha256(raw.data).hexdigest() == entry["sha256"], key
        compared += 1
    assert compared > 8


def test_what_only_the_import_has_is_named_as_another_spec_has_it(
    stored: dict[str, dict[str, Any]],
) -> None:
    """Nothing is there that no spec asks for, but the second name of a tied embedding."""
    for case, ours in stored.items():
        asked: set[str] = set()
        for record in RECORDS.values():
            asked |= record["entries"].keys() if record["case"] == case else set()
        odd = ours.keys() - asked
        if case == "deepseek_v3":  # no record of its local spec
            odd = {key for key in odd if "norm" not in key}
        assert odd <= {"module.output_layer.weight"}, case
