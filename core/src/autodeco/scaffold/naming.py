"""Finds out how a model calls what `autodeco.blocks` has rules for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from autodeco import blocks
from autodeco.blocks import HF_LAYER
from autodeco.family import ModelShape
from autodeco.weights import Dims, Rule

_QUERY = r"(q_proj|wq|query|query_proj|q_lin)"
_OTHERS = {"q_proj": ("k_proj", "v_proj"), "wq": ("wk", "wv"), "query": ("key", "value")}
_OTHERS |= {"query_proj": ("key_proj", "value_proj"), "q_lin": ("k_lin", "v_lin")}
_FUSED = r"(qkv_proj|query_key_value|c_attn|Wqkv|wqkv|qkv)"
_OUTPUT = ("o_proj", "wo", "out_proj", "dense", "c_proj", "out_lin")
_GATED = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("w1", "w2", "c_proj"),
    ("gate", "up", "down"),
)
_FUSED_GATED = ("gate_up_proj", "gate_up", "Wi", "w13")
_USUAL = {
    "layer_norms": ("input_layernorm", "post_attention_layernorm"),
    "norms_behind": ("post_attention_layernorm", "post_feedforward_layernorm"),
}
_FIRST = re.compile(r"input|attn|attention_norm|ln_1|ln1|operator_norm|pre_attention")


@dataclass(frozen=True)
class Block:
    """A call of a function of `autodeco.blocks` that fits.

    Attributes:
        name: The function's.
        kwargs: Its arguments that are not the defaults.
    """

    name: str
    kwargs: Mapping[str, Any]

    def rules(self) -> tuple[Rule, ...]:
        """Returns its rules."""
        made: tuple[Rule, ...] = getattr(blocks, self.name)(**self.kwargs)
        return made


class Names:
    """The names of a model's tensors, by what they are.

    Args:
        tensors: Name -> shape.
        shape: The sizes that they belong to.
    """

    def __init__(self, tensors: Mapping[str, Dims], shape: ModelShape) -> None:
        self.all = {template(name): size for name, size in tensors.items()}
        self.shape = shape
        heads = Counter(n.split("{layer}")[0] for n in self.all if "{layer}" in n)
        self.prefix = heads.most_common(1)[0][0] if heads else "model.layers."
        start = self.prefix + "{layer}."
        self.layer = {
            name.removeprefix(start): size
            for name, size in self.all.items()
            if name.startswith(start)
        }
        self.outside = {n: s for n, s in self.all.items() if "{layer}" not in n}
        self.attention, self.query, self.fused = self._attention()
        self.mlp = self._mlp()

    def renames(self) -> dict[str, str]:
        """Returns what blocks call otherwise -> the model's name, for `autodeco.blocks.renamed`."""
        found = {}
        if self.prefix + "{layer}." != HF_LAYER:
            found["model.layers."] = self.prefix
        if self.attention != "self_attn":
            found["self_attn."] = f"{self.attention}."
        if self.mlp != "mlp":
            found["}.mlp."] = f"}}.{self.mlp}."
        if self.query != "q_proj":
            found |= dict(zip(("k_proj", "v_proj"), _OTHERS[self.query], strict=True))
            found["q_proj"] = self.query
        norm = self._query_norm()
        if norm not in ("q_norm", ""):
            found["q_norm"] = norm
            found["k_norm"] = norm.replace("query", "key").replace("q_", "k_")
        return found

    def _attention(self) -> tuple[str, str, str | None]:
        """The attention's module, the query's projection, and the fused one, if it is so."""
        for name in self.layer:
            if match := re.fullmatch(rf"([\w.]+)\.{_QUERY}\.weight", name):
                return match[1], match[2], None
        for name in self.layer:
            if match := re.fullmatch(rf"([\w.]+)\.{_FUSED}\.weight", name):
                return match[1], "q_proj", match[2]
        return "self_attn", "q_proj", None

    def _mlp(self) -> str:
        """The dense feed-forward block's module."""
        last = "|".join(dict.fromkeys(("fc2", "dense_4h_to_h", *(g[2] for g in _GATED))))
        for name in self.layer:
            match = re.fullmatch(rf"([\w.]+)\.({last})\.weight", name)
            if match and "expert" not in name and match[1] != self.attention:
                return match[1]
        return "mlp"

    def _query_norm(self) -> str:
        names = ("q_norm", "q_layernorm", "query_layernorm", "q_ln")
        found = (n for n in names if f"{self.attention}.{n}.weight" in self.layer)
        return next(found, "")

    def blocks(self) -> Iterator[Block]:
        """Yields blocks that may fit, the likelier first; names are not proved yet."""
        yield from self._ends()
        yield from self._norms()
        if self.shape.is_latent:
            yield _block("latent_attention")
        else:
            yield self._grouped_attention()
        yield from self._gated_mlps()
        yield from self._experts()

    def _ends(self) -> Iterator[Block]:
        size = (self.shape.vocab_size, self.shape.hidden_size)
        names = [name for name, found in self.outside.items() if found == size]
        inputs = [n for n in names if re.search(r"embed_(tokens|in)|wte|tok_embed|word_emb", n)]
        name = (inputs or names or ["model.embed_tokens.weight"])[0]
        output = next((n for n in names if n != name), "lm_head.weight")
        yield _block(
            "embedding",
            **_unless(name=(name, "model.embed_tokens.weight"), output=(output, "lm_head.weight")),
        )
        width = (self.shape.hidden_size,)
        norms = [n for n, s in self.outside.items() if s == width and n.endswith(".weight")]
        for norm in norms:
            yield _block(
                "output_layer",
                **_unless(norm=(norm, "model.norm.weight"), output=(output, "lm_head.weight")),
            )

    def _norms(self) -> Iterator[Block]:
        width = (self.shape.hidden_size,)
        names = [
            n.removesuffix(".weight")
            for n, s in self.layer.items()
            if s == width and n.endswith(".weight") and not n.startswith(f"{self.attention}.")
        ]
        for first, second in _USUAL.values():
            if {first, second} <= set(names) and len(names) == 3:
                names = [first, second]
        behind = [n for n in names if n.startswith("post_")]
        if len(names) == 2 and len(behind) == 2:
            yield _block("norms_behind", **_two(behind, "norms_behind"))
            return
        if len(names) == 4 and len(behind) == 2:
            yield _block("norms_behind", **_two(behind, "norms_behind"))
            names = [n for n in names if n not in behind]
        if len(names) == 2:
            yield _block("layer_norms", **_two(names, "layer_norms"))

    def _grouped_attention(self) -> Block:
        def has(name: str, kind: str = "weight") -> bool:
            return f"{self.attention}.{name}.{kind}" in self.layer

        output = next((n for n in _OUTPUT if has(n)), "o_proj")
        norm = self.layer.get(f"{self.attention}.{self._query_norm()}.weight")
        kinds: dict[Dims, str] = {
            (self.shape.head_dim,): "head",
            (self.shape.num_heads * self.shape.head_dim,): "all_heads",
        }
        return _block(
            "grouped_attention",
            **_unless(
                bias=(has(self.fused or self.query, "bias"), False),
                output_bias=(has(output, "bias"), False),
                norms=(kinds.get(norm or (), "none"), "none"),
                fused=(self.fused, None),
                output=(output, "o_proj"),
            ),
        )

    def _gated_mlps(self) -> Iterator[Block]:
        for fused in _FUSED_GATED:
            if f"{self.mlp}.{fused}.weight" in self.layer:
                yield _block("gated_mlp", fused=fused)
        for gate, up, down in _GATED:
            if f"{self.mlp}.{gate}.weight" in self.layer:
                yield _block("gated_mlp", **_projections(gate, up, down))

    def _experts(self) -> Iterator[Block]:
        found = [n for n in self.layer if "experts.{expert}." in n]
        if found:
            block = found[0].split("experts.{expert}.")[0]
            size = (self.shape.num_experts, self.shape.hidden_size)
            routers = [
                n.removeprefix(block).removesuffix(".weight")
                for n, s in self.layer.items()
                if n.startswith(block) and s == size
            ]
            for gate, up, down in _GATED:
                yield _block(
                    "experts",
                    **_unless(block=(block, "mlp."), router=((routers or ["gate"])[0], "gate")),
                    **_projections(gate, up, down),
                )
        shared = {n.rsplit(".", 2)[0] + "." for n in self.layer if "shared_expert" in n}
        for name in sorted(shared):
            yield _block("shared_experts", **_unless(block=(name, "mlp.shared_experts.")))


def _block(function: str, /, **kwargs: Any) -> Block:
    return Block(function, kwargs)


def _unless(**values: tuple[Any, Any]) -> dict[str, Any]:
    """The arguments that are not the defaults."""
    return {name: value for name, (value, default) in values.items() if value != default}


def _projections(gate: str, up: str, down: str) -> dict[str, Any]:
    return _unless(gate=(gate, "gate_proj"), up=(up, "up_proj"), down=(down, "down_proj"))


def _two(names: list[str], block: str) -> dict[str, Any]:
    """Arguments of a block of two norms; the attention's is the first of the two."""
    usual = _USUAL[block]
    first = next((n for n in names if _FIRST.search(n)), names[0])
    if set(names) == set(usual):
        first = usual[0]
    second = next(n for n in names if n != first)
    return _unless(attention=(first, usual[0]), mlp=(second, usual[1]))


def template(name: str) -> str:
    """Returns a tensor's name with ``{layer}`` and ``{expert}`` in the place of numbers."""
    name = re.sub(r"(?<=\.)\d+(?=\.)", "{layer}", name, count=1)
    return re.sub(r"(?<=experts\.)\d+(?=\.)", "{expert}", name, count=1)
