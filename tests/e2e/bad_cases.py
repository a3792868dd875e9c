"""The kinds of bad input, one a row: how it is made, its exit code, what the message says."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bad_inputs import Case, World, spoiled

FAMILY = "from autodeco_plugin_qwen3.family import FAMILY\n"
FAKE = FAMILY + "import dataclasses\nfrom autodeco.plugin import FamilyPlugin\n"
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"


def set_value(value: float) -> Callable[[World], None]:
    def spoil(world: World) -> None:
        world.tensors(lambda t: t[NORM].view(-1)[5:6].fill_(value))

    return spoil


def plugin_case(name: str, source: str, *said: str, dist: str = "bad") -> Case:
    def prepare(world: World) -> list[Any]:
        return world.run(plugin=world.install(f"{dist}-{name.replace(' ', '-')}", "bad", source))

    return Case(name, 3, prepare, ("plugin bad (bad-", *said))


def data_case(name: str, record: Any, *said: str) -> Case:
    """A ninth line that cannot be used; the message has file and line."""
    return Case(name, 4, spoiled(lambda w: w.lines(record)), ("{data}:9", *said), begins=True)


def option_case(name: str, arguments: str, *said: str, code: int = 2, begins: bool = False) -> Case:
    return Case(name, code, lambda w: w.run(*arguments.split()), said, begins)


def config_case(name: str, changes: dict[str, Any], *said: str, code: int = 3) -> Case:
    return Case(name, code, spoiled(lambda w: w.config(**changes)), ("{model}/config.json", *said))


def overlap(header: dict[str, Any]) -> None:
    names = sorted(
        (n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"]
    )
    first, second = (header[n]["data_offsets"] for n in names[:2])
    size = second[1] - second[0]
    second[:] = [first[0], first[0] + size]


def other_heads(world: World) -> list[Any]:
    from autodeco.heads.files import save_heads
    from autodeco.heads.modules import DecodingHeads, HeadsConfig

    path = save_heads(world.root / "heads", DecodingHeads(HeadsConfig(32)), metadata={})
    return world.run("--init-heads", path)


def grow_tokenizer(world: World) -> None:
    path = world.model / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["vocab"]["far"] = 5000
    path.write_text(json.dumps(values))


def no_tokenizer(world: World) -> None:
    for path in world.model.glob("tokenizer*"):
        path.unlink()


def merged_model(layout: str) -> Callable[[World], None]:
    def spoil(world: World) -> None:
        from autodeco.heads.merge import merge

        merged = world.root / "merged"
        merge(world.model, world.pristine / "heads", merged, layout=layout)
        shutil.rmtree(world.model)
        merged.rename(world.model)

    return spoil


def replace_file(path: Callable[[World], Path], content: bytes) -> Callable[[World], Any]:
    return lambda world: path(world).write_bytes(content)


def real_model(world: World) -> Path:
    """The config.json and a header of a size without a built-in task."""
    from autodeco_plugin_qwen3.family import FAMILY

    preset = FAMILY.preset("8b")
    world.config(**FAMILY.architecture(preset.architecture).config_json(preset.shape))
    return world.model


def file_for_directory(world: World) -> list[Any]:
    world.out.write_text("not a directory")
    return world.run()


def export(world: World, *more: Any) -> list[Any]:
    return ["export", "--input", world.pristine, "--output", world.out / "heads", *more]


def occupied(world: World) -> list[Any]:
    world.out.mkdir()
    (world.out / "heads").mkdir()
    return export(world)


TOO_LONG = {"prompt": "a b c d " * 40, "completion": "e"}
CHAT = {"role": "user", "content": "hello"}

CASES = [
    # plugins
    plugin_case("import error", "import nothing_of_this_name\n", "nothing_of_this_name"),
    plugin_case("syntax error", "def plugin(:\n", "SyntaxError"),
    plugin_case("import that exits", "raise SystemExit(3)\n", "SystemExit"),
    plugin_case(
        "wrong api",
        FAKE + "plugin = FamilyPlugin(dataclasses.replace(FAMILY, id='bad', api=99))\n",
        "written for api 99",
    ),
    plugin_case("no plugin object", "other = 1\n", "no attribute 'plugin'"),
    plugin_case(
        "not a FamilyPlugin", FAMILY + "plugin = FAMILY\n", "FamilySpec, not a FamilyPlugin"
    ),
    plugin_case("a class", FAKE + "plugin = FamilyPlugin\n", "is a class"),
    plugin_case("another id", FAKE + "plugin = FamilyPlugin(FAMILY)\n", "id is 'qwen3'"),
    Case(
        "two plugins with one id",
        3,
        spoiled(lambda w: w.install("copycat", "qwen3", None, "autodeco_plugin_qwen3")),
        ("2 distributions claim the id: autodeco-plugin-qwen3, copycat", "uninstall all but one"),
    ),
    Case("unknown plugin", 3, lambda w: w.run(plugin="zebra"), ("pip install", "installed: ")),
    option_case("unknown preset", "--preset 9z", "no preset '9z'", "debug", code=3),
    option_case("preset of another size", "--preset 8b", "num_layers 36 expected, 3", code=3),
    Case(
        "no built-in model",
        3,
        lambda w: ["run", "--plugin", "qwen3", "--preset", "8b", "--out", w.out],
        ("no built-in model", "--model DIR", "Qwen/Qwen3-8B"),
    ),
    Case(
        "no built-in task",
        3,
        lambda w: ["run", "--plugin", "qwen3", "--model", real_model(w), "--out", w.out],
        ("'8b' has no built-in task", "--data FILE"),
    ),
    Case("nothing given", 3, lambda w: ["run", "--out", w.out], ("--plugin NAME", "--model DIR")),
    # config.json
    config_case("wrong family", {"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
    Case(
        "family of no plugin",
        3,
        spoiled(
            lambda w: w.config(architectures=["MambaForCausalLM"], model_type="mamba"), plugin=None
        ),
        ("MambaForCausalLM", "pip install autodeco-plugin-mamba"),
    ),
    config_case("no architecture", {"architectures": None}, "architecture"),
    config_case("another depth", {"num_hidden_layers": 4}, "num_layers", "nearest is 'debug'"),
    config_case("no hidden size", {"hidden_size": None}, "no 'hidden_size'"),
    config_case("size that is text", {"hidden_size": "64"}, "hidden_size"),
    config_case("no head size", {"head_dim": None, "hidden_size": "64"}, "hidden_size"),
    config_case("unsupported feature", {"attention_bias": True}, "attention_bias is True"),
    Case(
        "no config.json",
        5,
        spoiled(lambda w: (w.model / "config.json").unlink()),
        ("{model}/config.json", "missing"),
    ),
    Case(
        "malformed config.json",
        5,
        spoiled(replace_file(lambda w: w.model / "config.json", b'{"a": 1,\n')),
        ("{model}/config.json:2", "malformed JSON"),
    ),
    Case(
        "config.json that is a list",
        5,
        spoiled(replace_file(lambda w: w.model / "config.json", b"[1]")),
        ("{model}/config.json", "not an object"),
    ),
    Case(
        "no checkpoint there",
        5,
        spoiled(lambda w: shutil.rmtree(w.model)),
        ("{model}", "check the path"),
    ),
    # weights
    Case(
        "missing shard", 5, spoiled(lambda w: w.shards()[1].unlink()), ("00002-of-00002", "fetch")
    ),
    Case(
        "truncated weights",
        5,
        spoiled(lambda w: w.bytes("model.safetensors", lambda b: b[:-100])),
        ("{model}/model.safetensors", "cut short"),
    ),
    Case(
        "empty weights",
        5,
        spoiled(lambda w: w.bytes("model.safetensors", lambda b: b"")),
        ("{model}/model.safetensors", "cut short"),
    ),
    Case(
        "absurdly long header",
        5,
        spoiled(lambda w: w.bytes("model.safetensors", lambda b: b"\xff" * 7 + b"\x7f" + b[8:])),
        ("{model}/model.safetensors", "no safetensors header"),
    ),
    Case(
        "deeply nested header",
        5,
        spoiled(
            lambda w: w.bytes(
                "model.safetensors", lambda b: (90000).to_bytes(8, "little") + b"[" * 90000
            )
        ),
        ("{model}/model.safetensors", "malformed safetensors header"),
    ),
    Case("overlapping offsets", 5, spoiled(lambda w: w.header(overlap)), ("overlaps", "fetch")),
    Case(
        "unknown dtype",
        5,
        spoiled(lambda w: w.header(lambda h: h[NORM].update(dtype="F3"))),
        ("unknown dtype 'F3'", NORM),
    ),
    Case("NaN weight", 8, spoiled(set_value(float("nan"))), ("'model.norm.weight'", "NaN"), True),
    Case("infinite weight", 8, spoiled(set_value(float("inf"))), ("'model.norm.weight'",), True),
    Case(
        "missing tensor",
        5,
        spoiled(lambda w: w.tensors(lambda t: t.pop(NORM))),
        (NORM,),
        begins=True,
    ),
    Case(
        "unknown tensor",
        5,
        spoiled(lambda w: w.tensors(lambda t: t.update({"model.extra": torch.ones(3)}))),
        ("model.extra",),
        begins=True,
    ),
    Case(
        "tensor of another shape",
        5,
        spoiled(lambda w: w.tensors(lambda t: t.update({NORM: torch.ones(63)}))),
        (NORM, "(63,)", "(64,)"),
        begins=True,
    ),
    Case(
        "index that leaves the directory",
        5,
        spoiled(lambda w: w.shards(lambda m: m.update({NORM: "../secret.safetensors"}))),
        ("'../secret.safetensors'", "forged"),
    ),
    Case(
        "index that names an unknown tensor",
        5,
        spoiled(lambda w: w.shards(lambda m: m.update({"x": "model-00001-of-00002.safetensors"}))),
        ("'x'", "which it is not"),
    ),
    Case(
        "pickled weights only",
        5,
        spoiled(lambda w: w.weights_only_as("pytorch_model.bin", pickle.dumps({}))),
        ("pytorch_model.bin", "safetensors"),
    ),
    Case(
        "GGUF only",
        5,
        spoiled(lambda w: w.weights_only_as("model-q4.gguf", b"GGUF")),
        ("model-q4.gguf", "safetensors"),
    ),
    Case("merged model, native", 5, spoiled(merged_model("native")), ("merged", "autodeco split")),
    Case("merged model", 5, spoiled(merged_model("autodeco")), ("merged", "autodeco split")),
    # tokenizer
    Case("no tokenizer", 4, spoiled(no_tokenizer), ("tokenizer", "{model}"), begins=True),
    Case(
        "malformed tokenizer",
        4,
        spoiled(replace_file(lambda w: w.model / "tokenizer.json", b"{}")),
        ("tokenizer", "{model}"),
        begins=True,
    ),
    Case("tokenizer too large", 4, spoiled(grow_tokenizer), ("up to 5000", "1023"), begins=True),
    # data
    data_case("malformed JSON", '{"prompt": "a"', "malformed JSON", "one JSON object a line"),
    data_case("a list", [1], "holds a list, not an object"),
    data_case("missing key", {"prompt": "a"}, "'completion' is missing"),
    data_case("misspelt key", {"promt": "a", "completion": "b"}, "did you mean 'promt'"),
    data_case("empty completion", {"prompt": "a", "completion": ""}, "completion is empty"),
    data_case("empty prompt", {"prompt": "", "completion": "b"}, "prompt has no token"),
    data_case("number for text", {"prompt": 3, "completion": "b"}, "prompt is a int"),
    data_case("id too large", {"inputs": {"p_ids": [1], "r_ids": [1024]}}, "1024", "0..1023"),
    data_case("negative id", {"inputs": {"p_ids": [-1], "r_ids": [1]}}, "-1", "0..1023"),
    data_case("ids as text", {"inputs": {"p_ids": "1", "r_ids": [1]}}, "inputs.p_ids"),
    data_case("messages without answer", {"messages": [CHAT]}, "last message is of 'user'"),
    data_case("message without role", {"messages": [{"content": "x"}]}, "message 0 has no role"),
    Case(
        "not UTF-8",
        4,
        spoiled(replace_file(lambda w: w.data, b'{"prompt": "\xff", "completion": "b"}\n')),
        ("{data}:1", "UTF-8"),
        begins=True,
    ),
    Case("empty data", 4, spoiled(replace_file(lambda w: w.data, b"")), ("{data}", "empty"), True),
    Case("no data", 4, spoiled(lambda w: w.data.unlink()), ("{data}", "check the path")),
    Case("directory for data", 4, lambda w: w.run("--data", w.model), ("{model}", "directory")),
    Case("no eval data", 4, lambda w: w.run("--eval-data", w.root / "no"), ("check the path",)),
    Case(
        "no sample short enough",
        4,
        spoiled(replace_file(lambda w: w.data, json.dumps(TOO_LONG).encode()), "--max-length", "9"),
        ("{data}", "longer than --max-length 9", "check the file and --max-length"),
        begins=True,
    ),
    Case(
        "too few to hold out",
        4,
        spoiled(replace_file(lambda w: w.data, b'{"prompt": "a", "completion": "b"}')),
        ("{data}", "--eval-data"),
        begins=True,
    ),
    Case(
        "problem without gt",
        4,
        spoiled(replace_file(lambda w: w.problems, b'{"problem": "1+1"}\n')),
        ("{problems}:1", "no ground truth", "give 'gt'"),
    ),
    Case(
        "malformed problem",
        4,
        spoiled(replace_file(lambda w: w.problems, b"{")),
        ("{problems}:1", "malformed JSON"),
    ),
    Case("no problems", 4, spoiled(lambda w: w.problems.unlink()), ("{problems}", "check")),
    # heads
    Case("heads of another size", 5, other_heads, ("{root}/heads", "temp_head", "64"), begins=True),
    Case(
        "no heads there",
        5,
        lambda w: w.run("--init-heads", w.root / "no"),
        ("{root}/no", "check the path"),
    ),
    Case(
        "a model for heads",
        5,
        lambda w: w.run("--init-heads", w.model),
        ("{model}", "no heads"),
    ),
    # options
    option_case("unknown value", "--objective nnl", "'nnl' is not one of", "nll"),
    option_case("negative steps", "--max-steps -3", "max_steps: -3 is out of range", "at least 1"),
    option_case("zero batch", "--global-batch 0", "global_batch: 0", "at least 1"),
    option_case("NaN rate", "--learning-rate nan", "learning_rate: nan", "above 0"),
    option_case("whole data held out", "--held-out 1", "held_out", "below 1"),
    option_case("unknown device", "--device tpu9", "no device 'tpu9'", "cpu, cuda", begins=True),
    option_case("no such checkpoint word", "--checkpoint newest", "'newest'", "best, last or"),
    option_case("allowing an unknown change", "--allow-change sed", "'sed'", "'seed'"),
    Case("no config file", 2, lambda w: w.run("--config", w.root / "no.yaml"), ("no.yaml",)),
    # runs and outputs
    Case(
        "checkpoint that is not there", 6, lambda w: export(w, "--checkpoint", "77"), ("'77'", "1")
    ),
    Case(
        "resuming a run of another job",
        6,
        lambda w: w.run("--resume", w.pristine),
        ("training of this run is done", "--resume new", "--init-heads"),
    ),
    Case("resuming no run", 6, lambda w: w.run("--resume", w.root), ("{root}", "no run is there")),
    Case(
        "stage before its training",
        6,
        lambda w: ["export", *w.run()[1:]],
        ("no run of this job is trained", "train first"),
    ),
    Case("file for --out", 7, file_for_directory, ("{out}", "Not a directory"), begins=True),
    Case("output that exists", 2, occupied, ("{out}/heads", "exists already"), begins=True),
]
