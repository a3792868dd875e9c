"""``autodeco fetch`` against a hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_made import COMMIT, Hub
from tiny import save_tiny, tiny_model

INDEX = "model.safetensors.index.json"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    directory = save_tiny(tiny_model(), tmp_path / "model", "24KB")
    more = {
        "tokenizer.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "additional_chat_templates/tools.jinja": "{{ tools }}",
        "modeling_own.py": "raise SystemExit",
        "pytorch_model.bin": "pickle",
        "original/consolidated.00.pth": "pickle",
        "metal/model.bin": "kernel",
        "model.gguf": "gguf",
        "consolidated.safetensors": "named by no index",
        "README.md": "words",
    }
    for name, text in more.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)
    made = Hub(directory)
    yield made
    made.close()


def wanted(hub: Hub) -> dict[str, bytes]:
    shards = set(json.loads((hub.directory / INDEX).read_text())["weight_map"].values())
    small = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    small |= {"chat_template.jinja", "additional_chat_templates/tools.jinja", INDEX}
    return {name: (hub.directory / name).read_bytes() for name in small | shards}


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
    }


def run(
    hub: Hub | None, home: Path, *options: str, **more: str
) -> subprocess.CompletedProcess[str]:
    endpoint = hub.endpoint if hub else "http://127.0.0.1:9"
    plain = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    variables = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", **more}
    line = [sys.executable, "-m", "autodeco", "fetch", *options]
    return subprocess.run(line, env=plain | variables, capture_output=True, text=True, timeout=120)


def test_only_what_is_needed_and_every_byte(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("owner/model", "--output", str(out), "--json")
    done = run(hub, tmp_path / "home", *options, HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["path"], told["revision"], told["existed"]) == (str(out), COMMIT, False)
    assert contents(out) == wanted(hub) and told["files"] == len(wanted(hub))
    assert "Bearer hf_secret" in hub.tokens and "hf_secret" not in done.stdout + done.stderr
    assert not list(tmp_path.glob(".out*"))
    count = len(hub.gets)
    again = run(hub, tmp_path / "home", *options)
    assert again.returncode == 0 and json.loads(again.stdout)["existed"]
    assert len(hub.gets) == count  # compared, not fetched
    (out / "tokenizer.json").write_text("{ }")
    changed = run(hub, tmp_path / "home", *options)
    assert changed.returncode == 2 and "tokenizer.json in it is not that" in changed.stderr
    assert (out / "tokenizer.json").read_text() == "{ }"


def test_the_cache_and_offline(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    offline = run(None, home, "owner/model", HF_HUB_OFFLINE="1")
    assert offline.returncode == 7 and "HF_HUB_OFFLINE" in offline.stderr
    done = run(hub, home, "owner/model", "--revision", "main")
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert path.is_relative_to(home) and contents(path) == wanted(hub)
    cached = run(None, home, "owner/model", HF_HUB_OFFLINE="1")
    assert cached.returncode == 0 and cached.stdout == done.stdout, cached.stderr
    elsewhere = run(None, home, "owner/model", "--output", str(path / "x"), HF_HUB_OFFLINE="1")
    assert elsewhere.returncode == 7 and "--output" in elsewhere.stderr
    unreachable = run(None, home, "owner/model")
    assert unreachable.returncode == 7 and "run the same command again" in unreachable.stderr


@pytest.mark.parametrize("place", ["a directory", "the cache"])
def test_a_damaged_file_is_noticed_removed_and_fetched_again(
    hub: Hub, tmp_path: Path, place: str
) -> None:
    options = ["owner/model"]
    options += ["--output", str(tmp_path / "out")] if place == "a directory" else []
    shard = sorted(p.name for p in hub.directory.glob("model-*.safetensors"))[1]
    hub.spoiled = {shard}
    done = run(hub, tmp_path / "home", *options)
    assert done.returncode == 5 and shard in done.stderr and "again" in done.stderr
    assert not (tmp_path / "out").exists()
    hub.spoiled, hub.gets = set(), []
    done = run(hub, tmp_path / "home", *options)
    assert done.returncode == 0, done.stderr
    assert contents(Path(done.stdout.strip())) == wanted(hub)
    assert hub.gets == [shard]


def test_a_transfer_that_breaks_off_goes_on_within_the_file(hub: Hub, tmp_path: Path) -> None:
    shard = sorted(p.name for p in hub.directory.glob("model-*.safetensors"))[0]
    hub.cut = {shard: 5000}
    done = run(hub, tmp_path / "home", "owner/model", "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == wanted(hub) and hub.gets.count(shard) == 2


def test_a_killed_fetch_goes_on_with_what_is_missing(hub: Hub, tmp_path: Path) -> None:
    shards = sorted(p.name for p in hub.directory.glob("model-*.safetensors"))
    hub.status, options = 200, ("owner/model", "--output", str(tmp_path / "out"))
    hub.spoiled = set(shards[1:])  # these are removed, the first stays: as after a kill
    assert run(hub, tmp_path / "home", *options).returncode == 5
    place = tmp_path / ".out.fetching"
    left = place / ".cache" / "huggingface" / "download" / "x.0.incomplete"
    left.write_bytes(b"half")
    assert (place / shards[0]).is_file() and not (tmp_path / "out").exists()
    hub.spoiled, hub.gets = set(), []
    assert run(hub, tmp_path / "home", *options).returncode == 0
    assert sorted(hub.gets) == shards[1:] and contents(tmp_path / "out") == wanted(hub)
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("status", "code", "exit_code", "words"),
    [
        (404, "RepoNotFound", 5, "no such model"),
        (401, "RepoNotFound", 5, "no such model"),
        (403, "GatedRepo", 7, "accept its terms"),
        (401, "", 7, "HF_TOKEN"),
        (503, "", 7, "run the same command again"),
    ],
)
def test_what_the_hub_refuses(
    hub: Hub, tmp_path: Path, status: int, code: str, exit_code: int, words: str
) -> None:
    hub.status, hub.code = status, code or "Other"
    done = run(hub, tmp_path / "home", "owner/model", "--output", str(tmp_path / "out"))
    assert done.returncode == exit_code and words in done.stderr, done.stderr
    assert "do: " in done.stderr and not (tmp_path / "out").exists()


def test_what_cannot_be_meant(hub: Hub, tmp_path: Path) -> None:
    cases = [
        (("owner/model", "--revision", "none"), 5, "no revision 'none'"),
        ((str(tmp_path),), 2, "needs no fetching"),
        (("a/b/c",), 2, "owner/name"),
    ]
    for options, exit_code, words in cases:
        done = run(hub, tmp_path / "home", *options)
        assert done.returncode == exit_code and words in done.stderr, done.stderr


def test_no_room_is_said_before_a_shard_is_fetched(hub: Hub, tmp_path: Path) -> None:
    shard = sorted(p.name for p in hub.directory.glob("model-*.safetensors"))[0]
    hub.sizes = {shard: 1 << 60}
    done = run(hub, tmp_path / "home", "owner/model", "--output", str(tmp_path / "out"))
    assert done.returncode == 7 and "nothing was written" in done.stderr
    assert not [name for name in hub.gets if name.endswith(".safetensors")]


@pytest.mark.parametrize("fault", ["no safetensors", "a shard is not there", "surplus"])
def test_what_is_no_complete_checkpoint(hub: Hub, tmp_path: Path, fault: str) -> None:
    shards = sorted(hub.directory.glob("model-*.safetensors"))
    if fault == "no safetensors":
        (hub.directory / INDEX).unlink()
    elif fault == "a shard is not there":
        shards[0].unlink()
    else:
        index = json.loads((hub.directory / INDEX).read_text())
        index["weight_map"].pop("model.norm.weight")
        (hub.directory / INDEX).write_text(json.dumps(index))
    done = run(hub, tmp_path / "home", "owner/model", "--output", str(tmp_path / "out"))
    assert done.returncode == 5 and not (tmp_path / "out").exists(), done.stderr
    if fault == "no safetensors":
        assert "it has consolidated.safetensors" in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["run", "--plugin", "qwen3", "--model", "owner/model"],
        ["import", "--plugin", "qwen3", "--model", "owner/model"],
        ["merge", "--model", "owner/model", "--heads-dir", "x", "--output", "y"],
        ["data", "show", "--model", "owner/model", "--data", "x"],
    ],
)
def test_a_hub_id_as_model_says_fetch(command: list[str], tmp_path: Path) -> None:
    line = [sys.executable, "-m", "autodeco", *command]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode in (4, 5) and "autodeco fetch owner/model" in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())
