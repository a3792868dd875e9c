"""Records under which keys NeMo 2 stores a model, by NeMo's own importers and model classes.

It runs in NeMo's environment (requirements/nemo.txt), on one process without a GPU:

    python tools/record_nemo_keys.py --spec te --checkpoints DIR --output tests/nemo/keys

where DIR holds the checkpoints that tests/nemo/cases.py writes. With ``--spec te``, NeMo's
importer converts each of them and NeMo's own save writes it; what is recorded is read back from the
files: key, shape, dtype, and the sha256 of every tensor's bytes. With ``--spec local`` (without
Transformer Engine, which NeMo's importers cannot do without) NeMo builds and saves the same model
with the weights that it draws, and no sha256 is recorded.

Without a GPU this much is replaced; each file of the record lists it:

- torch.cuda answers questions about the device (`_CUDA`, `_CALLS`), and fusions that need one are
  switched off in the configuration (`_OFF`), which changes no key;
- ``--spec te`` takes Transformer Engine's Python modules as they are, from where ``pip install
  --no-deps --target DIR transformer-engine`` put them, and a stand-in for its compiled part,
  ``transformer_engine_torch``, of which only cuDNN's version is asked before a forward pass.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import importlib.machinery
import json
import os
import sys
import tempfile
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("ONE_LOGGER_ENABLED", "false")

import torch

_GPT = "nemo.collections.llm.gpt.model"
# case -> importer, what its configuration does not take from config.json
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama31": (f"{_GPT}.llama:HFLlamaImporter", {}),
    "qwen25": (f"{_GPT}.qwen2:HFQwen2Importer", {}),
    "qwen3": (f"{_GPT}.qwen3:HFQwen3Importer", {"kv_channels": "head_dim"}),
    "qwen3-moe": (
        f"{_GPT}.qwen3:HFQwen3Importer",
        {
            "kv_channels": "head_dim",
            "num_moe_experts": "num_experts",
            "moe_router_topk": "num_experts_per_tok",
        },
    ),
    "deepseek_v3": (f"{_GPT}.deepseek:HFDeepSeekImporter", {"vocab_size": "vocab_size"}),
    "gpt_oss": (
        f"{_GPT}.gpt_oss:HFGPTOSSImporter",
        {
            "hidden_size": "hidden_size",
            "num_attention_heads": "num_attention_heads",
            "num_query_groups": "num_key_value_heads",
            "kv_channels": "head_dim",
            "ffn_hidden_size": "intermediate_size",
            "moe_ffn_hidden_size": "intermediate_size",
            "moe_router_topk": "num_experts_per_tok",
            "vocab_size": "vocab_size",
        },
    ),
}
_CUDA = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "current_device": lambda: torch.device("cpu"),
    "device_count": lambda: 0,
    "get_device_capability": lambda *_: (9, 0),
    "synchronize": lambda *_: None,
    "empty_cache": lambda: None,
    "Stream": MagicMock(),
    "Event": MagicMock(),
    "current_stream": MagicMock(),
    "stream": lambda *_: contextlib.nullcontext(),
}
_OFF = {
    "apply_rope_fusion": False,
    "bias_activation_fusion": False,
    "gradient_accumulation_fusion": False,
    "moe_permute_fusion": False,
    "moe_shared_expert_overlap": False,
    "persist_layer_norm": False,
    "use_cpu_initialization": True,
    "moe_token_dispatcher_type": "allgather",
}
_OFF_LOCAL = {"moe_grouped_gemm": False}  # wants the package grouped_gemm
_CALLS = ["torch.empty(device='cuda')", "nemo.lightning.io.pl._fix_tensors_device"]
_TE = "transformer_engine"


class _Compiled(types.ModuleType):
    """Stands in for Transformer Engine's compiled part."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, made)
        return made


def take_transformer_engine(directory: Path) -> None:
    """Imports Transformer Engine's Python modules without its libraries."""
    sys.path.insert(0, str(directory))
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its own switch: no library is loaded
    found = importlib.machinery.PathFinder.find_spec(_TE)
    assert found is not None and found.submodule_search_locations, f"{_TE} is not installed"
    compiled = _Compiled(f"{_TE}_torch")
    compiled.__spec__ = importlib.machinery.ModuleSpec(compiled.__name__, None)
    compiled.get_cudnn_version = lambda: 91400  # type: ignore[attr-defined]  # the one question
    sys.modules[compiled.__name__] = compiled
    # its common part first: the package itself would load the compiled part
    package = types.ModuleType(_TE)
    package.__path__ = list(found.submodule_search_locations)
    package.__spec__ = found
    package.__version__ = version("transformer-engine")  # type: ignore[attr-defined]
    sys.modules[_TE] = package
    common = importlib.import_module(f"{_TE}.common")
    common.load_framework_extension = lambda *_: None  # type: ignore[attr-defined]
    package.common = common  # type: ignore[attr-defined]
    package.pytorch = importlib.import_module(f"{_TE}.pytorch")  # type: ignore[attr-defined]


def prepare(spec: str, engine: Path | None) -> dict[str, Any]:
    """Makes up for the GPU that is not there; returns what is replaced."""
    for name, value in _CUDA.items():
        setattr(torch.cuda, name, value)
    plain_empty = torch.empty

    def empty(*sizes: Any, **given: Any) -> torch.Tensor:
        if given.get("device") == "cuda":
            given["device"] = "cpu"
        return plain_empty(*sizes, **given)

    torch.empty = empty  # type: ignore[assignment]
    if engine is not None:
        take_transformer_engine(engine)
    from megatron.core.transformer.transformer_config import TransformerConfig

    values = {**_OFF, **(_OFF_LOCAL if spec == "local" else {})}
    plain = TransformerConfig.__post_init__

    def switched_off(self: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)
        plain(self)

    TransformerConfig.__post_init__ = switched_off
    from nemo.lightning.io import pl

    pl._fix_tensors_device = lambda loaded: loaded  # wants a CUDA device to move what is on another
    compiled = [f"{_TE}_torch (compiled)"] if spec == "te" else []
    calls = [f"torch.cuda.{name}" for name in sorted(_CUDA)] + _CALLS
    return {"calls": calls, "configuration": values, "modules": compiled}


def located(path: str) -> Any:
    """Returns what ``module:name`` names."""
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


def make(case: str, spec: str, source: Path, target: Path) -> None:
    """Has NeMo write a NeMo 2 checkpoint of a Hugging Face directory."""
    path, sizes = CASES[case]
    importer = located(path)(str(source))
    importer.trust_remote_code = importer.convert_mtp = False
    known = json.loads((source / "config.json").read_text())
    for name, key in sizes.items():
        if key in known:
            setattr(importer.config, name, known[key])
            if hasattr(importer.config, "__io__"):  # then context/ is made of it
                setattr(importer.config.__io__, name, known[key])
    if spec == "te":
        importer.apply(target)
        return
    from nemo.lightning import teardown

    model = importer.init()
    trainer = importer.nemo_setup(model)
    importer.nemo_save(target, trainer)
    teardown(trainer, model)


def make_with_heads(target: Path) -> None:
    """Has NeMo write a tiny model with heads where the published training code has them."""
    from nemo.collections.llm.gpt.model.qwen3 import HFQwen3Importer, Qwen3Config, Qwen3Model

    def head(width: int) -> torch.nn.Module:
        layers = torch.nn.Linear(width, 256), torch.nn.ReLU(), torch.nn.Linear(256, 1)
        return torch.nn.ModuleDict({"mlp": torch.nn.Sequential(*layers)})

    config = Qwen3Config(
        num_layers=2,
        hidden_size=16,
        ffn_hidden_size=32,
        num_attention_heads=2,
        num_query_groups=1,
        kv_channels=8,
        vocab_size=128,
        bf16=True,
        params_dtype=torch.bfloat16,
    )
    connector, model = HFQwen3Importer("none"), Qwen3Model(config)
    trainer = connector.nemo_setup(model)
    torch.manual_seed(0)
    # the second head also reads T and four features of the distribution
    heads = {"temp_head": head(16), "top_p_head": head(16 + 5)}
    model.module.adapter = torch.nn.ModuleDict(heads)
    connector.nemo_save(target, trainer)


def entries(weights: Path, with_bytes: bool) -> dict[str, Any]:
    """Returns what a torch_dist checkpoint holds."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    metadata = FileSystemReader(weights).read_metadata().state_dict_metadata
    tensors = {k: v for k, v in metadata.items() if isinstance(v, TensorStorageMetadata)}
    state = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in tensors.items()}
    if with_bytes:
        load(state, storage_reader=FileSystemReader(weights), no_dist=True)
    found: dict[str, Any] = {}
    for key in sorted(metadata):
        if key not in tensors:
            found[key] = {"object": True}
            continue
        dtype = str(tensors[key].properties.dtype).removeprefix("torch.")
        found[key] = {"shape": list(tensors[key].size), "dtype": dtype}
        if with_bytes:
            raw = state[key].contiguous().view(-1).view(torch.uint8).numpy()
            found[key]["sha256"] = hashlib.sha256(raw.data).hexdigest()
    return found


def versions(spec: str) -> dict[str, str]:
    """Returns the versions of what had a say."""
    names = ["nemo_toolkit", "megatron-core", "torch", "transformers"]
    return {
        name: version(name) for name in names + (["transformer-engine"] if spec == "te" else [])
    }


def main() -> None:
    """Records the cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", choices=("local", "te"), required=True)
    parser.add_argument("--checkpoints", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--transformer-engine", type=Path, help="where pip --target put it")
    parser.add_argument("--keep", type=Path, help="keep NeMo's checkpoints here")
    parser.add_argument("cases", nargs="*", choices=(*CASES, []), default=[])
    parser.add_argument("--heads", type=Path, help="write a checkpoint with heads here, no record")
    given = parser.parse_args()
    replaced = prepare(given.spec, given.transformer_engine if given.spec == "te" else None)
    if given.heads:
        make_with_heads(given.heads)
        return
    given.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        for case in given.cases or CASES:
            target = (given.keep or Path(temporary)) / f"{case}-{given.spec}"
            make(case, given.spec, given.checkpoints / case, target)
            record = {
                "case": case,
                "spec": given.spec,
                "importer": CASES[case][0],
                "versions": versions(given.spec),
                "replaced": replaced,
                "entries": entries(target / "weights", given.spec == "te"),
            }
            path = given.output / f"{case}.{given.spec}.json"
            path.write_text(json.dumps(record, indent=1) + "\n")
            print(path)


if __name__ == "__main__":
    main()
