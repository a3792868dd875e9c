"""Writes ``context/`` of a NeMo 2 checkpoint: run by NeMo's own Python, with a request's path.

It stands alone (NeMo and the standard library), and is spoken with by files. The request::

    {"importer": "module:Class", "model": DIR, "sizes": {field: value},
     "output": DIR, "answer": FILE}

NeMo's importer makes the configuration and the tokenizer from the Hugging Face directory, and NeMo
dumps them. Importers leave some sizes at those of the models that they were written for: `sizes`
are the checkpoint's. The answer is ``{"changed": {field: value}, "versions": {...}}``, or
``{"error": text, "kind": "environment" | "weights"}`` with exit status 1.
"""

import importlib
import json
import sys
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

# what a configuration refuses to be made with where Transformer Engine is not installed
_OF_TE = ("apply_rope_fusion", "moe_permute_fusion")
_ACTIVATION = "bias_activation_fusion"


def importer_of(request: dict[str, Any], place: Path) -> Any:
    """Returns NeMo's importer of a directory; it will run no code of the directory."""
    from transformers import AutoTokenizer, GenerationConfig

    module, name = request["importer"].split(":")
    if module.split(".")[0] != "nemo":
        raise ImportError(f"{module} is no module of NeMo")
    importer = getattr(importlib.import_module(module), name)(request["model"])
    importer.trust_remote_code = importer.convert_mtp = False

    def save_tokenizer(source: str, *_: Any) -> str:
        # NeMo's own trusts remote code, and saves where every user of the machine does
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        tokenizer.save_pretrained(place)
        return str(place)

    importer.save_hf_tokenizer_assets = save_tokenizer
    if not (Path(request["model"]) / "generation_config.json").exists():
        GenerationConfig.from_pretrained = classmethod(lambda cls, *_, **__: cls())
    return importer


def relax(fusions: tuple[str, ...]) -> None:
    """Lets a configuration ask for fusions that this machine lacks; another one will train.

    The fusion of an activation is switched off where megatron-core does not know NeMo's function:
    that depends on their versions, and not on the machine.
    """
    from megatron.core.transformer.transformer_config import TransformerConfig

    plain = TransformerConfig.__post_init__

    def checked(self: Any) -> None:
        wanted = {name: getattr(self, name) for name in fusions if hasattr(self, name)}
        for name in wanted:
            setattr(self, name, False)
        try:
            plain(self)
        except ValueError as error:
            if _ACTIVATION not in str(error):
                raise
            setattr(self, _ACTIVATION, False)
            plain(self)
        for name, value in wanted.items():
            setattr(self, name, value)

    TransformerConfig.__post_init__ = checked


def has_transformer_engine() -> bool:
    """Returns whether NeMo will find Transformer Engine."""
    from nemo.utils.import_utils import safe_import

    return bool(safe_import("transformer_engine")[1])


def for_transformer_engine(spec: Any) -> Any:
    """Returns the maker of layers; one that was fixed by what is installed here is for anywhere."""
    if not (isinstance(spec, partial) and "use_transformer_engine" in spec.keywords):
        return spec
    return partial(spec.func, *spec.args, **{**spec.keywords, "use_transformer_engine": True})


def fit(config: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    """Gives a configuration the checkpoint's sizes; returns those that it had not."""
    changed = {}
    for name, value in sizes.items():
        if getattr(config, name) != value:
            changed[name] = value
            setattr(config, name, value)
        if hasattr(config, "__io__"):  # then this is dumped, and not the configuration itself
            setattr(config.__io__, name, value)
    return changed


def write(request: dict[str, Any], place: Path) -> dict[str, Any]:
    """Has NeMo write the directory; returns which sizes NeMo's importer had otherwise."""
    from nemo.lightning import MegatronStrategy, Trainer
    from nemo.lightning.io.pl import TrainerContext

    relax(() if has_transformer_engine() else _OF_TE)
    importer = importer_of(request, place)
    config = importer.config
    layer = for_transformer_engine(config.transformer_layer_spec)
    more = {_ACTIVATION: getattr(config, _ACTIVATION), "transformer_layer_spec": layer}
    changed = fit(config, {**request["sizes"], **more})
    changed.pop("transformer_layer_spec", None)  # no value of JSON
    # as NeMo's ModelConnector.nemo_setup makes it
    strategy = MegatronStrategy(ckpt_save_optimizer=False, always_save_context=True)
    trainer = Trainer(devices=1, accelerator="cpu", strategy=strategy)
    context = TrainerContext(model=importer.init(), trainer=trainer, extra={})
    context.io_dump(Path(request["output"]), yaml_attrs=["model"])
    return changed


def main() -> int:
    """Answers one request; returns the exit status."""
    request = json.loads(Path(sys.argv[1]).read_text())
    answer: dict[str, Any]
    try:
        with tempfile.TemporaryDirectory() as place:
            changed = write(request, Path(place) / "nemo_tokenizer")
        names = ("nemo_toolkit", "megatron-core", "torch", "transformers")
        answer = {"changed": changed, "versions": {name: version(name) for name in names}}
    except ImportError as error:
        answer = {"error": str(error), "kind": "environment"}
    except Exception as error:  # whatever NeMo does not like is told, not lost
        answer = {"error": f"{type(error).__name__}: {error}", "kind": "weights"}
    partial = Path(request["answer"] + ".partial")
    partial.write_text(json.dumps(answer))
    partial.replace(request["answer"])
    return 1 if "error" in answer else 0


if __name__ == "__main__":
    sys.exit(main())
