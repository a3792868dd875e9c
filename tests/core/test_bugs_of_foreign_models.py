"""Tokenizers and models of strangers, as transformers loads them: nothing outside, all checked."""

from __future__ import annotations

import dataclasses
import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from autodeco.convert.stored import Manifest, Part, Piece, WrittenFile, WrittenPiece
from autodeco.convert.stored_reader import StoredReader
from autodeco.decoding import AutoDecoModelForCausalLM
from autodeco.decoding.command import generate_text
from autodeco.engines.hf import HFEngine, loading_options
from autodeco.errors import DataError, NumericsError, WeightsError
from autodeco.heads.files import save_heads
from autodeco.heads.modules import DecodingHeads, HeadsConfig
from autodeco.training.tokenization import load_tokenizer

DEMO = Path(str(resources.files("autodeco_plugin_qwen3"))) / "demo"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_file", "/etc/passwd"),
        ("tokenizer_file", "../other/tokenizer.json"),
        ("fast_tokenizer_files", ["tokenizer.json", "../other/tokenizer.4.0.json"]),
        ("merges_file", "sub/merges.txt"),
        ("vocab_file", 7),
    ],
)
def test_bug_a_tokenizers_configuration_could_name_files_outside(
    model: Path, key: str, value: Any
) -> None:
    change(model / "tokenizer_config.json", **{key: value})
    with pytest.raises(DataError, match=f"{key} is .*outside of the directory"):
        load_tokenizer(model)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[" * 9000),
        ("tokenizer_config.json", '{"model_max_length": "x"}'),
        ("tokenizer_config.json", '{"tokenizer_class": 7}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 1}}'),
    ],
)
def test_bug_a_broken_tokenizer_was_a_traceback(model: Path, name: str, content: str) -> None:
    (model / name).write_text(content)
    with pytest.raises((DataError, WeightsError)):
        load_tokenizer(model)


def test_a_tokenizer_with_code_of_its_own_is_refused_without_the_flag(model: Path) -> None:
    ran = model / "ran"
    (model / "tok.py").write_text(f"open({str(ran)!r}, 'w')\nclass T: pass\n")
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tok.T"]})
    try:
        load_tokenizer(model)
    except DataError as error:
        assert "custom code" in error.what
    assert not ran.exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"transformers_weights": "../other.safetensors"}, "transformers_weights"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_experts": 1e300}, "num_experts"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers"),
    ],
)
def test_bug_transformers_was_handed_what_had_not_been_checked(
    model: Path, values: dict[str, Any], message: str
) -> None:
    change(model / "config.json", **values)
    with pytest.raises(WeightsError, match=message):
        loading_options(model)
    with pytest.raises(WeightsError, match=message):
        HFEngine(model, torch.device("cpu"), torch.float32)


def imported(directory: Path, **changes: Any) -> Path:
    """An imported checkpoint of one piece, with a manifest that may be forged."""
    (directory / "weights").mkdir(parents=True)
    content = torch.arange(4, dtype=torch.float32).numpy().tobytes()
    (directory / "weights" / "one.distcp").write_bytes(content)
    piece = Piece("t", 0, (2, 2), "t", (), (2, 2), (0, 0))
    written = WrittenPiece(piece, "float32", "one.distcp", 0, 16, 0, 16, "")
    forged = dataclasses.replace(written, **changes)
    part = Part("one.distcp", WrittenFile(16, 0), (forged,))
    manifest = Manifest("", (part,), {}).to_json()
    (directory / "import.json").write_text(json.dumps(manifest))
    return directory


@pytest.mark.parametrize(
    "changes",
    [
        {"file": "../../outside"},
        {"file": "/etc/passwd"},
        {"dtype": "load"},
        {"dtype": "nn"},
        {"dtype": 7},
        {"start": 10**6},
        {"start": -1},
        {"size": 10**30},
        {"size": "16"},
        {"size": 3},
    ],
)
def test_bug_a_forged_manifest_led_out_of_the_imported_checkpoint(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    (tmp_path / "outside").write_bytes(bytes(16))
    with StoredReader(imported(tmp_path / "good")) as reader:
        assert reader.read("t").tolist() == [[0, 1], [2, 3]]
    with pytest.raises(WeightsError), StoredReader(imported(tmp_path / "bad", **changes)) as bad:
        bad.read("t")


def test_bug_a_weight_that_is_no_number_was_a_traceback_in_generate(
    model: Path, tmp_path: Path
) -> None:
    size = json.loads((model / "config.json").read_text())["hidden_size"]
    heads = save_heads(tmp_path / "heads", DecodingHeads(HeadsConfig(size)), metadata={})
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericsError, match="not finite"):
        generated(model, heads)


def generated(model: Path, heads: Path) -> Any:
    return generate_text(
        model=model,
        heads=heads,
        prompt="a",
        chat=False,
        max_new_tokens=1,
        temperature_scale=None,
        top_p_scale=None,
        seed=0,
        device="cpu",
    )


def test_a_checkpoint_of_pickles_alone_is_not_loaded(model: Path, tmp_path: Path) -> None:
    size = json.loads((model / "config.json").read_text())["hidden_size"]
    heads = save_heads(tmp_path / "heads", DecodingHeads(HeadsConfig(size)), metadata={})
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(OSError, match="no file named model"):
        AutoDecoModelForCausalLM.from_pretrained(model, heads=heads)
    with pytest.raises(WeightsError, match=r"only pytorch_model\.bin, which is not read"):
        generated(model, heads)


@pytest.mark.parametrize(
    ("name", "content"),
    [("generation_config.json", "[]"), ("config.json", None)],
)
def test_bug_a_model_that_transformers_refuses_was_a_traceback(
    model: Path, name: str, content: str | None
) -> None:
    if content is None:
        change(model / name, head_dim="x", pad_token_id=10**6)
    else:
        (model / name).write_text(content)
    with pytest.raises(WeightsError, match=r"transformers cannot load|not an object"):
        HFEngine(model, torch.device("cpu"), torch.float32)
