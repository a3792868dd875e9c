"""What transformers' generate() calls on a model, with the heads' part added to each."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from autodeco.decoding.policy import SAMPLING_PARAMETERS
from autodeco.errors import UsageError

CALL_KEYS = ("autodeco_warp", "temperature_scale", "top_p_scale")
TRACE_KEY = "autodeco_trace"
# Whether the code that runs was called by our own generate(), which knows what the user chose.
_GENERATING: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "autodeco_generating", default=False
)


@contextlib.contextmanager
def generating() -> Iterator[None]:
    """Marks what runs inside as part of a generate() call of ours."""
    token = _GENERATING.set(True)
    try:
        yield
    finally:
        _GENERATING.reset(token)


@functools.cache
def _said() -> list[str]:
    """What this process was warned of."""
    return []


def warn_heads_off(reason: str) -> None:
    """Warns, once in a process, that a sampling parameter switched the heads off.

    Args:
        reason: See `heads_off_reason`.
    """
    if _said():
        return
    _said().append(reason)
    warnings.warn(
        f"AutoDeco's heads are off in this call: {reason}. They predict temperature and top-p for "
        f"each token, so to keep them on leave {', '.join(SAMPLING_PARAMETERS)} unset (in a "
        "generation_config too) and turn temperature_scale and top_p_scale instead; "
        "autodeco=False switches them off without this warning, which comes once.",
        UserWarning,
        stacklevel=3,
    )


@dataclass
class Trace:
    """T and P of the tokens of one generate() call."""

    assisted: bool = False
    temperature: list[Tensor] = field(default_factory=list)
    top_p: list[Tensor] = field(default_factory=list)

    def add(self, outputs: Any, new_tokens: int) -> None:
        # An assisted step scores several candidates and keeps the first; any other scores one.
        at = slice(0, new_tokens) if self.assisted else slice(-1, None)
        self.temperature.append(outputs["temperature"][:, at].clone())
        self.top_p.append(outputs["top_p"][:, at].clone())


class GenerationHooks:
    """Stands in front of transformers' GenerationMixin; keeps no state of a call."""

    def _setting(self, name: str, call: Mapping[str, Any], passed: Any) -> Any:
        """A generation setting as transformers resolves it: call, config passed, model's own."""
        if name in call:
            return call[name]
        for config in (passed, getattr(self, "generation_config", None)):
            value = getattr(config, name, None)
            if value is not None:
                return value
        return None

    def _refuse(self, call: Mapping[str, Any], passed: Any) -> None:
        """What cannot be combined with heads is refused, not decoded wrongly."""
        fix = "pass autodeco=False, or leave that setting out"
        if (self._setting("num_beams", call, passed) or 1) > 1:
            raise UsageError("beam search does not sample with the heads' T and P", fix=fix)
        if (self._setting("guidance_scale", call, passed) or 1) != 1:
            raise UsageError("classifier-free guidance cannot be combined with the heads", fix=fix)
        if self._setting("cache_implementation", call, passed) == "paged":
            raise UsageError("continuous batching cannot be combined with the heads", fix=fix)
        if self._setting("assistant_early_exit", call, passed) is not None:
            raise UsageError("early-exit drafting cannot be combined with the heads", fix=fix)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: continuous batching hands no keyword on to forward().

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "continuous batching would ignore the heads",
            fix="use generate(), or serve the checkpoint with vLLM",
        )

    init_continuous_batching = generate_batch
    continuous_batching_context_manager = generate_batch

    def _prepare_generation_config(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        parent: Any = super()
        config, model_kwargs = parent._prepare_generation_config(generation_config, *args, **kwargs)
        if model_kwargs.get("autodeco_warp"):
            # The model's and transformers' defaults (top_k = 50) are no choice of the user's.
            config.temperature, config.top_p, config.top_k, config.min_p = 1.0, 1.0, 0, None
        elif not _GENERATING.get():
            # A pipeline asks with its own defaults, and hands the answer on as a user's config.
            for name in SAMPLING_PARAMETERS:
                setattr(config, name, kwargs.get(name))
        return config, model_kwargs

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        parent: Any = super()
        ours = (*CALL_KEYS, TRACE_KEY)
        parent._validate_model_kwargs({k: v for k, v in model_kwargs.items() if k not in ours})

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        parent: Any = super()
        trace = model_kwargs.get(TRACE_KEY)
        if trace is not None:
            trace.add(outputs, int(kwargs.get("num_new_tokens", 1)))
        return parent._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        parent: Any = super()
        given = kwargs["model_kwargs"]
        trace = given.get(TRACE_KEY)
        if trace is not None:
            if not self._supports_logits_to_keep():
                raise UsageError(
                    "this architecture cannot return T and P from assisted decoding",
                    fix="drop return_autodeco or the assistant",
                )
            trace.assisted = True
        # A draft model does not know our keywords.
        kwargs["model_kwargs"] = {
            k: v for k, v in given.items() if k not in (*CALL_KEYS, TRACE_KEY)
        }
        return parent._get_candidate_generator(*args, **kwargs)

    def _supports_logits_to_keep(self) -> bool:
        parent: Any = super()
        return bool(parent._supports_logits_to_keep())
