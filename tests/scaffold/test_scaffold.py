"""What ``autodeco plugin new`` proposes, and how it writes it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autodeco import blocks
from autodeco.errors import AutodecoError, UsageError, WeightsError
from autodeco.family import FromConfig
from autodeco.scaffold import writing
from autodeco.scaffold.literals import Call, Comment, source
from autodeco.scaffold.matching import propose
from autodeco.scaffold.naming import template
from autodeco.scaffold.reading import Source, read_source
from autodeco.scaffold.rendering import TODO, Plugin, files_of
from autodeco.scaffold.sizes import expressions, small_shape
from autodeco.scaffold.writing import new_plugin

CONFIG: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32000,
}


def config_file(directory: Path, **changes: Any) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / "config.json"
    path.write_text(json.dumps({k: v for k, v in {**CONFIG, **changes}.items() if v is not None}))
    return path


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return read_source(config_file(tmp_path_factory.mktemp("Some-7B")))


def plugin_of(read: Source, **changes: Any) -> Plugin:
    changed = dataclasses.replace(read, **changes)
    return Plugin("stranger", "Some-7B", changed, propose(changed, ()))


def text_of(plugin: Plugin, name: str) -> str:
    return files_of(plugin)[f"src/autodeco_plugin_stranger/{name}.py"]


def assert_formatted(files: dict[str, str], directory: Path) -> None:
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent)) or shutil.which("ruff")
    if ruff is None:
        pytest.skip("ruff is not installed")
    writing._write(directory, files)
    for command in (("format", "--check"), ("check", "--select", "E,F,I,UP,W")):
        done = subprocess.run(
            [ruff, *command, "--no-cache", "."], cwd=directory, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_names_that_blocks_know_become_blocks_alone(read: Source) -> None:
    proposal = plugin_of(read).proposal
    assert [block.name for block in proposal.blocks] == [
        "embedding", "layer_norms", "grouped_attention", "gated_mlp", "output_layer",
    ]  # fmt: skip
    assert not proposal.left and not proposal.rules and not proposal.renames


def test_the_architecture_has_what_is_no_size(read: Source) -> None:
    text = text_of(plugin_of(read), "family")
    assert '"rope_theta": 10000.0' in text and '"hidden_size"' not in text
    assert '"use_cache"' not in text and '"torch_dtype"' not in text
    assert 'required={"hidden_act": "silu"}' in text
    assert '"window_size": (FromConfig("sliding_window", plus=-1), 0)' in text
    assert 'name="7b"' in text and "ModelShape(32, 4096, 32, 8, 128, 14336, 32000)" in text
    assert 'config={"sliding_window": 8}' in text, "the small model must reach the window"


def test_other_names_of_the_same_blocks_are_renamed(read: Source) -> None:
    other = {"model.layers.": "transformer.h.", "self_attn.": "attention.", ".mlp.": ".ffn."}
    other |= {"q_proj": "wq", "k_proj": "wk", "v_proj": "wv"}

    def renamed(name: str) -> str:
        for old, new in other.items():
            name = name.replace(old, new)
        return name

    plugin = plugin_of(read, tensors={renamed(n): s for n, s in read.tensors.items()})
    assert not plugin.proposal.left and len(plugin.proposal.blocks) == 5
    assert "rules=renamed(" in text_of(plugin, "weights")


def test_what_nothing_is_known_for_is_marked_with_its_size(read: Source, tmp_path: Path) -> None:
    more = {f"model.layers.{n}.self_attn.odd.weight": (192, 96) for n in range(3)}
    more |= {f"model.layers.{n}.self_attn.odder.weight": (77, 96) for n in range(3)}
    more["model.layers.1.rare.weight"] = (96,)
    plugin = plugin_of(read, tensors={**read.tensors, **more})
    assert [left.layers for left in plugin.proposal.left] == ["some", "all", "all"]
    text = text_of(plugin, "weights")
    assert f"# {TODO}: megatron-core's names of these" in text
    assert "lambda s: (s.num_heads * s.head_dim, s.hidden_size)" in text
    assert f"# {TODO}: 77 is this size in the debug preset alone" in text
    assert "# model.layers.{layer}.rare.weight [96]: not in all layers" in text
    assert writing._known_reason(plugin).startswith(f"{TODO}: weights.py has no")
    reason = dataclasses.replace(plugin, no_megatron=writing._known_reason(plugin))
    assert_formatted(files_of(reason), tmp_path)


def test_tensors_of_the_checkpoint_alone_are_to_be_dropped_with_a_reason(
    read: Source, tmp_path: Path
) -> None:
    plugin = plugin_of(read, extra=("model.layers.{layer}.self_attn.rotary_emb.inv_freq",))
    text = text_of(plugin, "weights")
    assert r'r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"' in text
    assert_formatted(files_of(plugin), tmp_path)


def test_a_checkpoint_tells_its_storage_and_what_lies_behind_the_last_layer() -> None:
    """DeepSeek's demo: FP8 is the most common, one tensor is float32, a layer is left over."""
    import autodeco_plugin_deepseek_v3 as deepseek

    demo = Path(str(deepseek.__file__)).parent / "demo"
    given = read_source(demo)
    assert set(given.stored.values()) == {"fp8_blocks", "F32"}
    assert given.extra == ("model.layers.{layer}.*",)
    plugin = Plugin("stranger", "demo", given, propose(given, (deepseek.plugin.family,)))
    text = text_of(plugin, "family")
    assert '"fp8_blocks"' in text and "qk_head_dim" not in text
    assert 'FromConfig("routed_scaling_factor")' in text
    assert r'Drop(r"model\.layers\.{layer}\..*", ' in text_of(plugin, "weights")
    assert not plugin.proposal.left


def test_files_are_formatted_and_always_the_same(read: Source, tmp_path: Path) -> None:
    stored = {"model.layers.{layer}.mlp.up_proj.weight": "fp8_blocks"}
    long = dataclasses.replace(plugin_of(read, stored=stored), no_megatron="why, in words " * 9)
    for number, plugin in enumerate((plugin_of(read), long)):
        assert files_of(plugin) == files_of(plugin)
        assert_formatted(files_of(plugin), tmp_path / str(number))
    again = read_source(Path(read.where))
    assert files_of(plugin_of(again)) == files_of(plugin_of(read))


def test_every_product_of_small_sizes_is_another_number(read: Source) -> None:
    for shape in (read.shape, dataclasses.replace(read.shape, num_experts=64, expert_ffn_size=9)):
        small = small_shape(shape, layers=3, own_head_dim=True)
        found = expressions(small)
        assert found[small.hidden_size] == "s.hidden_size"
        assert found[small.num_heads * small.head_dim] == "s.num_heads * s.head_dim"
        assert found[small.ffn_size] == "s.ffn_size"


def test_a_shape_that_is_read_is_the_one_that_was_meant(read: Source) -> None:
    assert (read.shape.num_layers, read.shape.head_dim, read.shape.num_kv_heads) == (32, 128, 8)
    assert read.small.num_heads * read.small.head_dim != read.small.hidden_size


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "nobody_knows"}, "does not know the model type"),
        ({"architectures": None}, "names no architecture"),
        ({"text_config": {"hidden_size": 8}}, "nests a language model's"),
        ({"architectures": ["NobodyForCausalLM"]}, "no class NobodyForCausalLM"),
    ],
)
def test_configurations_that_no_plugin_can_begin_from(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=says) as caught:
        read_source(config_file(tmp_path / "m", **changes))
    assert caught.value.fix and "config.json" in str(caught.value.where)


@pytest.mark.parametrize("name", ["Upper", "1st", "with-dash", "class", "", "../up", "qwen3"])
def test_names_that_no_plugin_can_have(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        new_plugin(name, config_file(tmp_path / "m"), tmp_path / "out")
    assert caught.value.fix
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_of_a_package_that_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(directory: Path, files: dict[str, str]) -> None:
        (directory / "half").write_text("")
        raise OSError(28, "No space left on device")

    begin = config_file(tmp_path / "m")
    monkeypatch.setattr(writing, "_tried", lambda plugin: (plugin, {}))
    monkeypatch.setattr(writing, "_write", full)
    with pytest.raises(AutodecoError, match="No space left"):
        new_plugin("stranger", begin, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_what_the_megatron_engine_computes_otherwise_is_kept_from_it(
    read: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"logits-hf": "pass: ", "logits-megatron": "fail: logits differ by 3.21e-01"}
    monkeypatch.setattr(writing, "_trial", lambda plugin: told)
    plugin, trial = writing._tried(plugin_of(read))
    assert plugin.no_megatron.startswith(f"{TODO}: logits differ by 3.2e-01") and trial == told
    told["logits-megatron"] = "not run: megatron-core is not installed"
    assert "never tried" in writing._tried(plugin_of(read))[0].no_megatron


def test_source_of_values() -> None:
    assert source(FromConfig("a", 2, equals="b")) == ['FromConfig("a", 2, equals="b")']
    assert source((1,)) == ["(1,)"]
    assert source({"a": r"x\d"}) == ['{"a": r"x\\d"}']
    assert source(Call("f", (Comment("why"), 1))) == ["f(", "    # why", "    1,", ")"]
    assert template("model.layers.3.mlp.experts.17.w1.weight") == (
        "model.layers.{layer}.mlp.experts.{expert}.w1.weight"
    )


def test_renamed_rules_have_other_sources_and_the_same_targets() -> None:
    plain = blocks.embedding(output="model.head.weight")
    other = blocks.renamed(plain, {"model.": "decoder."})
    assert [rule.target for rule in other] == [rule.target for rule in plain]
    assert other[1].sources == ("decoder.embed_tokens.weight",)
    assert other[1].twins == ("decoder.head.weight",)
