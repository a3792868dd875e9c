"""A transformers model whose generate() samples each token with the heads' own T and P.

The class of a model is made from two: `AutoDecoModelForCausalLM` in front of transformers' own
class. ``forward(autodeco_warp=True)`` returns logits that are already divided by T and cut to the
nucleus; generate() asks for it by a keyword that travels with the call, so that no call leaves
anything on the module for another one to find.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from autodeco.decoding.config import AutoDecoConfig, asked_base_config
from autodeco.decoding.hooks import (
    CALL_KEYS,
    TRACE_KEY,
    GenerationHooks,
    Trace,
    generating,
    warn_heads_off,
)
from autodeco.decoding.policy import SAMPLING_PARAMETERS, check_scale, heads_off_reason
from autodeco.engines import hf
from autodeco.errors import UsageError, WeightsError
from autodeco.files import read_json, read_object
from autodeco.heads.files import BACKBONE_PREFIX, LoadedHeads, load_heads
from autodeco.heads.identity import AUTODECO_MODEL_TYPE, CONFIG_FILE, text_config
from autodeco.heads.modules import DecodingHeads
from autodeco.heads.warp import TEMPERATURE_FLOOR, warp

TOP_P_FLOOR = 1e-6
# Where the output layer's input of the forward in progress goes: one list a thread and a call.
_CAPTURE: contextvars.ContextVar[list[Tensor] | None] = contextvars.ContextVar(
    "autodeco_hidden", default=None
)


def _capture_input(module: Any, args: tuple[Any, ...]) -> None:
    box = _CAPTURE.get()
    if box is not None:
        box.append(args[0])


def dial(
    temperature: Tensor, top_p: Tensor, temperature_scale: float, top_p_scale: float
) -> tuple[Tensor, Tensor]:
    """What is sampled with: the prediction times the scales, T >= 1e-4 and P in [1e-6, 1]."""
    return (
        (temperature * temperature_scale).clamp_min(TEMPERATURE_FLOOR),
        (top_p * top_p_scale).clamp(TOP_P_FLOOR, 1.0),
    )


class AutoDecoModelForCausalLM(GenerationHooks):
    """A causal language model with decoding heads; made by `from_pretrained`, never directly.

    Attributes:
        autodeco_heads: the `DecodingHeads`, float32.
        autodeco_metadata: what their heads directory says of them.
    """

    config_class: ClassVar[Any] = AutoDecoConfig
    autodeco_heads: DecodingHeads
    autodeco_metadata: Mapping[str, Any]

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *args: Any, heads: str | Path | None = None, **kwargs: Any
    ) -> Any:
        """Loads a merged checkpoint of either layout, or a base model and heads.

        Args:
            path: merged checkpoint directory, or a base model (directory or hub name).
            heads: whatever `load_heads` reads; needed when `path` holds none, and taken instead
                of those that it holds.
            **kwargs: as transformers' from_pretrained (dtype, device_map, ...).

        Returns:
            The model, in eval mode: an instance of this class and of transformers' own class.

        Raises:
            WeightsError: no heads there, or they do not fit the model.
        """
        if cls is not AutoDecoModelForCausalLM:  # transformers' own loading of the made class
            parent: Any = super()
            return parent.from_pretrained(path, *args, **kwargs)
        kwargs = {"trust_remote_code": False, "use_safetensors": True, **kwargs}
        file = Path(path) / CONFIG_FILE
        read = read_json(file) if file.is_file() else {}
        config = read if isinstance(read, dict) else {}  # what it should be, `load_heads` says
        size = text_config(config).get("hidden_size")
        loaded = load_heads(Path(heads if heads is not None else path), hidden_size=size)
        if config.get("model_type") == AUTODECO_MODEL_TYPE:
            model = _load_renamed(path, config, *args, **kwargs)
        else:
            model = AutoModelForCausalLM.from_pretrained(path, *args, **kwargs)
        return attach(model, loaded)

    def forward(
        self,
        *args: Any,
        autodeco_warp: bool | None = None,
        return_autodeco: bool = False,
        temperature_scale: float | None = None,
        top_p_scale: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward; the heads run only when asked for.

        Args:
            autodeco_warp: logits come back as float32 z/T, tokens outside the nucleus lowered by
                1e4 (probability 0; generate() may rule out others, as by min_new_tokens, and must
                find one), and the output has `temperature` and `top_p`, float32 [batch, positions].
            return_autodeco: `temperature` and `top_p` are there, the logits stay raw.
            temperature_scale, top_p_scale: the dial; default: as stored with the heads.
        """
        parent: Any = super()
        if not (autodeco_warp or return_autodeco):
            return parent.forward(*args, **kwargs)
        as_tuple = kwargs.pop("return_dict", None) is False
        box: list[Tensor] = []
        token = _CAPTURE.set(box)
        try:
            out = parent.forward(*args, return_dict=True, **kwargs)
        finally:
            _CAPTURE.reset(token)
        t, p = self._predict(box, out.logits, temperature_scale, top_p_scale)
        if autodeco_warp:
            flat = out.logits.flatten(0, -2)
            out.logits = warp(flat, t.flatten(), p.flatten(), soft=True).view_as(out.logits)
        out["temperature"], out["top_p"] = t, p
        return out.to_tuple() if as_tuple else out

    def _predict(
        self,
        box: list[Tensor],
        logits: Tensor,
        temperature_scale: float | None,
        top_p_scale: float | None,
    ) -> tuple[Tensor, Tensor]:
        """T and P [batch, positions] of the positions that `logits` holds, after the dial."""
        if not box:
            raise WeightsError(
                "the model does not call its output layer, so the heads have nothing to read",
                who=type(self).__name__,
                fix="this architecture is not supported; decode with autodeco=False",
            )
        heads = self.autodeco_heads
        h = box[-1][:, -logits.shape[-2] :]
        device = next(heads.parameters()).device
        t, p = heads.predict(h.flatten(0, -2).to(device), logits.flatten(0, -2).to(device))
        t, p = dial(
            t,
            p,
            self._scale("temperature_scale", temperature_scale),
            self._scale("top_p_scale", top_p_scale),
        )
        shape = logits.shape[:-1]
        return t.view(shape).to(logits.device), p.view(shape).to(logits.device)

    def _scale(self, name: str, value: float | None) -> float:
        return check_scale(name, self.autodeco_metadata.get(name, 1.0) if value is None else value)

    def generate(
        self,
        inputs: Any = None,
        generation_config: Any = None,
        *args: Any,
        autodeco: bool = True,
        return_autodeco: bool = False,
        temperature_scale: float | None = None,
        top_p_scale: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' generate(), each token sampled with its own T and P.

        The heads are off when `autodeco` is False, when decoding is greedy, or when the call or
        the `generation_config` passed to it sets temperature, top_p, top_k or min_p to a value
        that is not neutral; the call is then transformers' own.

        Args:
            inputs, generation_config, *args, **kwargs: as transformers' generate().
            autodeco: False switches the heads off.
            return_autodeco: return a ModelOutput that also has `temperature` and `top_p`, float32
                [batch, new tokens]: what each token was sampled with. Behind the end of a
                sequence that is shorter than its batch they mean nothing.
            temperature_scale, top_p_scale: the dial, multipliers on what the heads predict;
                default: as stored with the heads.

        Raises:
            UsageError: beam sampling, classifier-free guidance or continuous batching with the
                heads on; `return_autodeco` with the heads off; a scale that is not positive.
        """
        parent: Any = super()
        scales = {"temperature_scale": temperature_scale, "top_p_scale": top_p_scale}
        for name, value in scales.items():
            self._scale(name, value)
        explicit = {
            name: kwargs[name] if name in kwargs else getattr(generation_config, name, None)
            for name in SAMPLING_PARAMETERS
        }
        greedy = not self._setting("do_sample", kwargs, generation_config)
        reason = heads_off_reason(explicit, autodeco=autodeco, greedy=greedy)
        if reason is not None:
            if return_autodeco:
                raise UsageError(
                    f"no T and P to return: the heads are off ({reason})",
                    fix="leave the sampling parameters unset and sample, or drop return_autodeco",
                )
            if autodeco and not greedy:
                warn_heads_off(reason)
            with generating():
                return parent.generate(inputs, generation_config, *args, **kwargs)
        self._refuse(kwargs, generation_config)
        call: dict[str, Any] = {
            "autodeco_warp": True,
            **{k: v for k, v in scales.items() if v is not None},
        }
        if not return_autodeco:
            return parent.generate(inputs, generation_config, *args, **call, **kwargs)
        trace = Trace()
        kwargs["return_dict_in_generate"] = True
        out = parent.generate(
            inputs, generation_config, *args, autodeco_trace=trace, **call, **kwargs
        )
        length = out.sequences.shape[1] - _prompt_length(inputs, kwargs)
        out["temperature"] = torch.cat(trace.temperature, dim=1)[:, :length]
        out["top_p"] = torch.cat(trace.top_p, dim=1)[:, :length]
        return out

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a copy written from memory could not keep the base's bytes.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "a model with heads is not saved from memory",
            fix="save heads with autodeco.heads.files.save_heads, and merge them into the base "
            "with `autodeco merge`",
        )


def _prompt_length(inputs: Any, kwargs: Mapping[str, Any]) -> int:
    """Tokens of the prompt in what generate() returns: none where it was given as embeddings."""
    ids = kwargs.get("input_ids") if inputs is None else inputs
    if ids is not None:
        return int(ids.shape[1])
    return 0 if kwargs.get("inputs_embeds") is not None else 1  # nothing given: it begins with BOS


def _load_renamed(path: str | Path, merged: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Loads the backbone of an `autodeco` layout, whose names stand under ``llm.``."""
    base = asked_base_config(merged, kwargs.pop("config", None))
    if base._attn_implementation is not None:
        kwargs.setdefault("attn_implementation", base._attn_implementation)
    # As without a config of ours: what is no option of loading overrides the model's config.
    base, kwargs = type(base).from_dict(base.to_dict(), return_unused_kwargs=True, **kwargs)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(base), None)
    if kind is None:
        raise WeightsError(
            f"transformers has no causal language model for {type(base).__name__}",
            where=str(path),
            fix="update transformers",
        )
    ignored = [*(kind._keys_to_ignore_on_load_unexpected or ()), r"^(temp|top_p)_head\."]
    loader: Any = type(
        kind.__name__, (kind,), {"_keys_to_ignore_on_load_unexpected": ignored, **_owned(kind)}
    )
    mapping = {r"^llm\.": "", **(kwargs.pop("key_mapping", None) or {})}
    # Only for loading: the instance then gets the class that `attach` makes of transformers' own.
    model: Any = loader.from_pretrained(path, *args, config=base, key_mapping=mapping, **kwargs)
    model.__class__ = kind
    return model


def load_decoded(path: Path, heads: Path, dtype: torch.dtype) -> Any:
    """Loads a model whose tensors are stored in parts (FP8, MXFP4), decoded as it is read.

    transformers' own loading keeps them so on a GPU, and wants further packages for the rest.

    Args:
        path: merged checkpoint directory of either layout, or a base model.
        heads: whatever `load_heads` reads.
        dtype: of the model.

    Returns:
        As `AutoDecoModelForCausalLM.from_pretrained`.

    Raises:
        WeightsError: no heads there, they do not fit the model, or a tensor is missing.
    """
    config = read_object(path / CONFIG_FILE)
    loaded = load_heads(heads, hidden_size=text_config(config).get("hidden_size"))
    if config.get("model_type") != AUTODECO_MODEL_TYPE:
        return attach(hf.load_decoded(path, dtype), loaded)
    base = asked_base_config(config, None)
    return attach(hf.load_decoded(path, dtype, config=base, prefix=BACKBONE_PREFIX), loaded)


def _owned(kind: Any) -> dict[str, Any]:
    return {"__module__": kind.__module__, "config_class": kind.config_class}


def attach(model: Any, loaded: LoadedHeads) -> Any:
    """Gives a loaded transformers model its heads; the model itself changes its class.

    Raises:
        WeightsError: the heads are of another size, or the model has no output layer.
    """
    output = model.get_output_embeddings()
    if output is None:
        raise WeightsError(
            "the model has no output layer",
            who=type(model).__name__,
            fix="use a causal language model",
        )
    size = model.config.get_text_config().hidden_size
    if loaded.heads.config.hidden_size != size:
        raise WeightsError(
            f"the heads read {loaded.heads.config.hidden_size} numbers, the model gives {size}",
            where=str(loaded.path),
            fix="use heads that were trained on this model",
        )
    device = output.weight.device
    stock: Any = type(model)
    model.__class__ = model_class_for(stock)
    model.autodeco_heads = loaded.heads.to("cpu" if device.type == "meta" else device)
    model.autodeco_metadata = dict(loaded.metadata)
    output.register_forward_pre_hook(_capture_input)
    generation = getattr(model, "generation_config", None)
    if generation is not None:  # as in a merged checkpoint: the vendor's choice is not the user's
        generation.do_sample = True
        for name in SAMPLING_PARAMETERS:
            setattr(generation, name, None)
        # A pipeline puts a temperature of its own (0.7) where the model has none; this one is
        # what transformers takes for none.
        generation.temperature = 1.0
    return model.eval()


@functools.cache
def model_class_for(base: Any) -> Any:
    """AutoDeco<Arch>: the heads' behaviour in front of a transformers class."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return AutoDecoModelForCausalLM.forward(self, *args, **kwargs)

    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop(TRACE_KEY, None)
        inputs = base.prepare_inputs_for_generation(self, *args, **kwargs)
        # A family's own version may drop keywords that it does not know.
        inputs.update({k: kwargs[k] for k in CALL_KEYS if k in kwargs})
        return inputs

    # generate() inspects both signatures to learn what the model takes.
    forward = functools.wraps(base.forward)(forward)
    forward.__signature__ = _signature_with_ours(base.forward)  # type: ignore[attr-defined]
    prepare = functools.wraps(base.prepare_inputs_for_generation)(prepare)
    members = {
        **_owned(base),
        "__module__": __name__,
        "forward": forward,
        "prepare_inputs_for_generation": prepare,
    }
    return type("AutoDeco" + base.__name__, (AutoDecoModelForCausalLM, base), members)


def _signature_with_ours(function: Any) -> inspect.Signature:
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    at = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
    ours = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in (*CALL_KEYS, "return_autodeco")
    ]
    return signature.replace(parameters=[*parameters[:at], *ours, *parameters[at:]])
