"""The files of a new plugin's package."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from autodeco import __version__
from autodeco.family import FromConfig, ModelShape
from autodeco.scaffold.literals import WIDTH, Call, Comment, Raw, quoted, source
from autodeco.scaffold.matching import Proposal
from autodeco.scaffold.reading import Source
from autodeco.scaffold.sizes import expert_ranks
from autodeco.scaffold.weight_source import weights_source

TODO = "TODO(author)"
_ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "quick_gelu": "quick_gelu"}
_ACTIVATIONS |= dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu_tanh")
_EPSILONS = ("layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
_POSITIONAL = 11  # fields of ModelShape up to the width of an expert


@dataclass(frozen=True)
class Plugin:
    """Everything that the files are made of.

    Attributes:
        name: The family's id.
        origin: What it was begun from, for people.
        source: The model.
        proposal: Its weight map.
        no_megatron: Why the megatron engine cannot run it; "": it can.
    """

    name: str
    origin: str
    source: Source
    proposal: Proposal
    no_megatron: str = ""

    @property
    def package(self) -> str:
        """Returns the Python package's name."""
        return f"autodeco_plugin_{self.name}"

    @property
    def dist(self) -> str:
        """Returns the distribution's name."""
        return "autodeco-plugin-" + re.sub(r"[-_.]+", "-", self.name).strip("-").lower()

    @property
    def title(self) -> str:
        """Returns the family's name for people, from that of its architecture."""
        return re.sub(r"(ForCausalLM|LMHeadModel)$", "", self.source.name)

    @property
    def preset(self) -> str:
        """Returns the name of the preset that has the given sizes."""
        size = re.search(r"(?i)(\d+x)?\d+(\.\d+)?[bm](-a\d+(\.\d+)?b)?(?![a-z])", self.origin)
        return size[0].lower() if size else "base"


def files_of(plugin: Plugin) -> dict[str, str]:
    """Returns path -> content of every file of the package."""
    package = f"src/{plugin.package}"
    return {
        "pyproject.toml": _pyproject(plugin),
        "README.md": _readme(plugin),
        f"{package}/__init__.py": _init(plugin),
        f"{package}/family.py": _family(plugin),
        f"{package}/weights.py": weights_source(plugin.title, plugin.proposal, plugin.source),
        f"{package}/py.typed": "",
        f"tests/test_{plugin.name}.py": _test(plugin),
    }


def _pyproject(plugin: Plugin) -> str:
    major, minor, *_ = __version__.split(".")
    above = f"{major}.{int(minor) + 1}" if major == "0" else f"{int(major) + 1}"
    return f"""[build-system]
requires = ["hatchling>=1.26"]
build-backend = "hatchling.build"

[project]
name = "{plugin.dist}"
version = "0.1.0"
description = "AutoDeco plugin for the {plugin.title} family."
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["autodeco>={major}.{minor},<{above}"]

[project.entry-points."autodeco.plugins"]
{plugin.name} = "{plugin.package}:plugin"

[tool.hatch.build.targets.wheel]
packages = ["src/{plugin.package}"]

[tool.ruff]
line-length = {WIDTH}
"""


def _readme(plugin: Plugin) -> str:
    return f"""# {plugin.dist}

{plugin.title} for AutoDeco.

    pip install {plugin.dist}
    autodeco plugin check {plugin.name}
    autodeco run --plugin {plugin.name}
"""


def _init(plugin: Plugin) -> str:
    return f'''"""{plugin.title} for AutoDeco."""

from autodeco.plugin import FamilyPlugin

from {plugin.package}.family import FAMILY

plugin = FamilyPlugin(FAMILY)
'''


def _test(plugin: Plugin) -> str:
    name = "".join(part.capitalize() for part in plugin.name.split("_"))
    return f'''"""The plugin does all that a plugin must."""

from autodeco.testing import FamilyContract


class Test{name}(FamilyContract):
    plugin = "{plugin.name}"
'''


def _family(plugin: Plugin) -> str:
    const = plugin.name.upper()
    architecture = _architecture(plugin)
    spec = Call(
        "FamilySpec",
        (),
        {
            "id": plugin.name,
            "title": plugin.title,
            "package": plugin.package,
            "architectures": (Raw(const),),
            "weight_map": Raw("WEIGHT_MAP"),
            "presets": (_debug(plugin, const), _own(plugin, const)),
        },
    )
    body = [*source(architecture, head=f"{const} = "), "", *source(spec, head="FAMILY = ")]
    names = ["Architecture", "FamilySpec", "ModelPreset", "ModelShape", "ParallelLayout"]
    if any("FromConfig(" in line for line in body):
        names.insert(2, "FromConfig")
    head = [f'"""{plugin.title}\'s architecture and presets."""', ""]
    imports = "from autodeco.family import " + ", ".join(names)
    if len(imports) > WIDTH:
        imports = "from autodeco.family import (\n    " + ",\n    ".join(names) + ",\n)"
    head += [imports, "from autodeco.recipes import DEBUG, TRAINING"]
    head += ["", f"from {plugin.package}.weights import WEIGHT_MAP", ""]
    return "\n".join([*head, *body]) + "\n"


def _architecture(plugin: Plugin) -> Call:
    given, proposal = plugin.source, plugin.proposal
    usual = {item: key for item, key in given.keys.items() if key != _usual_key(item)}
    values: dict[str, Any] = {
        "name": given.name,
        "model_type": given.config["model_type"],
        "config": given.shared,
        "config_keys": usual,
        "required": _required(given.shared),
        "megatron": megatron_fields(given, proposal),
        "norms": "behind" if _is_behind(proposal) else "before",
        "qk_norm": (proposal.block("grouped_attention") or {}).get("norms", "none"),
        "stored": _stored(given.stored),
        "no_megatron": plugin.no_megatron,
    }
    defaults = {"norms": "before", "qk_norm": "none", "no_megatron": ""}
    kept = {k: v for k, v in values.items() if v and v != defaults.get(k)}
    if "no_megatron" in kept:
        kept["no_megatron"] = _long(kept["no_megatron"])
    return Call("Architecture", (), kept)


def _is_behind(proposal: Proposal) -> bool:
    return proposal.block("norms_behind") is not None and proposal.block("layer_norms") is None


def _long(text: str) -> Any:
    """A long string, in pieces of a line each."""
    pieces = textwrap.wrap(text, 84, drop_whitespace=False, break_on_hyphens=False)
    if len(pieces) == 1:
        return text
    inner = "".join(f"\n        {source(piece)[0]}" for piece in pieces)
    return Raw(f"({inner}\n    )")


def _usual_key(name: str) -> str:
    from autodeco.family import Architecture

    return Architecture("", "").keys().get(name, "")


def _required(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the weight map and the engines rely on: every switch."""
    return {
        key: value
        for key, value in config.items()
        if value is None or isinstance(value, bool | str) or value == []
    }


def _stored(stored: Mapping[str, str]) -> dict[str, str]:
    return {
        re.escape(name)
        .replace(r"\{layer\}", r"\d+")
        .replace(r"\{expert\}", r"\d+")
        .replace(r"\_", "_"): kind
        for name, kind in sorted(stored.items())
    }


def megatron_fields(given: Source, proposal: Proposal) -> dict[str, Any]:
    """Returns the fields of TransformerConfig that follow from names and configuration."""
    config = given.full
    values: dict[str, Any] = dict(proposal.megatron)
    attention = proposal.block("grouped_attention") or {}
    if attention.get("bias"):
        values["add_qkv_bias"] = True
    if attention.get("output_bias"):
        values["add_bias_linear"] = True
    for key in _EPSILONS:
        if given.config.get(key) is not None:
            values["layernorm_epsilon"] = FromConfig(key)
    keys = ("hidden_act", "hidden_activation", "activation_function")
    activation = next((config[key] for key in keys if config.get(key)), "silu")
    if activation in _ACTIVATIONS:
        values["activation_func"] = _ACTIVATIONS[activation]
    if given.shape.num_experts and config.get("norm_topk_prob") is False:
        values["moe_router_pre_softmax"] = True
    if given.config.get("sliding_window") and config.get("use_sliding_window") is not False:
        values["window_size"] = (FromConfig("sliding_window", plus=-1), 0)
        if given.config.get("layer_types"):
            values["window_attn_skip_freq"] = FromConfig("layer_types", equals="sliding_attention")
    return values


def shape_call(shape: ModelShape) -> Call:
    """Returns a shape's source, by position where that is readable."""
    values = asdict(shape)
    defaults = {item.name: item.default for item in fields(ModelShape)}
    changed = [name for name in values if values[name] != defaults[name]]
    order = list(values)
    last = max(order.index(name) for name in changed)
    if last < _POSITIONAL:
        return Call("ModelShape", tuple(values[name] for name in order[: last + 1]))
    return Call("ModelShape", (), {name: values[name] for name in changed})


def _debug(plugin: Plugin, const: str) -> Call:
    values: dict[str, Any] = {
        "name": "debug",
        "architecture": Raw(f"{const}.name"),
        "shape": shape_call(plugin.source.small),
        "recipe": Raw("DEBUG"),
        "random": True,
        "task": "stories",
    }
    if plugin.source.small_config:
        values["config"] = dict(plugin.source.small_config)
    return Call("ModelPreset", (), values)


def _own(plugin: Plugin, const: str) -> Call:
    experts = expert_ranks(plugin.source.shape)
    layout = Call(
        "ParallelLayout", (), ({"expert": experts} if experts > 1 else {}) | {"gpus": max(8, 1)}
    )
    name = Path(plugin.origin).name
    values: list[Any] = [
        Raw(f'name="{plugin.preset}"'),
        Raw(f"architecture={const}.name"),
        Raw("\n".join(source(shape_call(plugin.source.shape), 12, "shape=")).strip()),
        Comment(f"{TODO}: its ids on the hub, and a layout that `autodeco plan` proves"),
        Raw(f"model_ids=({quoted(f'{TODO}/{name}')},)"),
        Raw(source(layout, head="layout=")[0]),
        Raw("recipe=TRAINING"),
    ]
    if plugin.source.own:
        values.append(Raw("\n".join(source(plugin.source.own, 12, "config=")).strip()))
    return Call("ModelPreset", tuple(values))
