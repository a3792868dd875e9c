"""The config of a checkpoint in the `autodeco` layout."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from autodeco.errors import WeightsError
from autodeco.heads.identity import AUTODECO_MODEL_TYPE
from autodeco.heads.split import restored_config


class AutoDecoConfig(PretrainedConfig):  # type: ignore[misc]  # transformers is untyped here
    """The flat config of a merged checkpoint: the base model's keys under another model_type."""

    model_type = AUTODECO_MODEL_TYPE

    def base_config(self) -> Any:
        """The base model's own config.

        Raises:
            WeightsError: config.json does not name a base model that transformers knows.
        """
        return base_config(self.to_dict())


def base_config(merged: dict[str, Any]) -> Any:
    """The base model's config out of a merged config.json; see `AutoDecoConfig.base_config`."""
    values = restored_config(merged, published=True)
    kind = values.pop("model_type", None)
    try:
        return AutoConfig.for_model(kind, **values)
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"the base model type {kind!r} is unknown to transformers: {error}",
            where="base_model_type in config.json",
            fix="update transformers, or split the checkpoint and load base and heads",
        ) from error


def asked_base_config(merged: dict[str, Any], given: Any) -> Any:
    """The base model's config out of a merged config.json, as a caller wants it.

    Args:
        merged: the content of config.json.
        given: a config that was passed to from_pretrained: ours, in which AutoConfig has set what
            the caller overrides; the base model's own, which is taken as it is; or None.
    """
    if given is None:
        return base_config(merged)
    if not isinstance(given, AutoDecoConfig):
        return given
    stored = AutoDecoConfig.from_dict(dict(merged)).to_dict()
    changed = {k: v for k, v in given.to_dict().items() if k not in stored or stored[k] != v}
    base = base_config({**merged, **changed})
    base._attn_implementation = given._attn_implementation
    return base
