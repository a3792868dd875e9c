"""The checks as data, in the order of what they cost; the code of each stands where it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from autodeco.errors import EnvironmentProblem, PluginError, UsageError

if TYPE_CHECKING:
    from autodeco.testing.context import Context


class CheckFailed(PluginError):
    """A plugin does not do what it must."""


class NotRun(EnvironmentProblem):
    """A check could not be made, which is no pass.

    Args:
        what: Why.
        fix: What makes it possible.
        excused: It has no object in this plugin, or the plugin says that it cannot be.
    """

    def __init__(self, what: str, *, fix: str, excused: bool = False) -> None:
        super().__init__(what, fix=fix)
        self.excused = excused


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: As in ``--only``.
        level: What it looks at.
        proves: What is true of a plugin that passes.
        body: ``module:function`` under `autodeco.testing`; the function takes the `Context`,
            returns what was measured, and raises `CheckFailed` or `NotRun`.
        needs: Checks without which it says nothing.
        costly: It takes minutes for large models.
    """

    name: str
    level: str
    proves: str
    body: str
    needs: tuple[str, ...] = ()
    costly: bool = False

    def run(self, context: Context) -> str:
        """Makes the check.

        Returns:
            What was measured.

        Raises:
            CheckFailed, AutodecoError: The plugin fails.
            NotRun: It cannot be made here.
        """
        module, _, name = self.body.partition(":")
        function: Callable[[Context], str] = getattr(
            import_module(f"autodeco.testing.{module}"), name
        )
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the models are so small that more would wait for each other
        try:
            return function(context)
        finally:
            torch.set_num_threads(threads)


_DATA = ("presets", "map")
_LOGITS = (*_DATA, "round-trip", "logits-hf")

CHECKS: tuple[Check, ...] = (
    Check(
        "metadata",
        "package",
        "the entry point, id, api and aliases are as discovery wants them",
        "metadata:entry_point",
    ),
    Check(
        "imports",
        "package",
        "the plugin imports the contract alone, and nothing heavy comes with it",
        "metadata:imports",
    ),
    Check(
        "presets",
        "data",
        "every preset is one that its architecture, its recipe and its files allow",
        "metadata:presets",
    ),
    Check(
        "layouts",
        "data",
        "every preset's layout splits its layers, heads, experts and processes evenly",
        "metadata:layouts",
        ("presets",),
    ),
    Check(
        "map",
        "weight map",
        "each preset's rules read every element of a source once and fill every target once, and "
        "no matrix of a random preset hides a transposition",
        "maps:expansion",
        ("presets",),
    ),
    Check(
        "storage",
        "weight map",
        "what is stored in parts is decoded to what was encoded, whole or block by block",
        "storage:formats",
        ("presets", "map"),
    ),
    Check(
        "names",
        "weight map",
        "the map's sources are the tensors that transformers saves, at full size",
        "maps:transformers_names",
        _DATA,
    ),
    Check(
        "index",
        "weight map",
        "the map is total on the names of a published checkpoint",
        "maps:index",
        _DATA,
    ),
    Check(
        "engine-names",
        "weight map",
        "the map's targets are the parameters of the megatron engine, at full width",
        "maps:engine_names",
        _DATA,
    ),
    Check(
        "round-trip",
        "weight map",
        "sources are packed into targets and back bit by bit",
        "maps:round_trip",
        _DATA,
    ),
    Check(
        "logits-hf",
        "logits",
        "the hf engine gives the logits of stock transformers",
        "logits:of_hf",
        (*_DATA, "round-trip"),
    ),
    Check(
        "reach",
        "logits",
        "the sequences reach windows, rotary scaling and clamps",
        "reach:features",
        _LOGITS,
    ),
    Check(
        "logits-megatron",
        "logits",
        "the megatron engine gives the logits of the hf engine",
        "logits:of_megatron",
        _LOGITS,
    ),
    Check(
        "training",
        "heads",
        "two steps move every tensor of the heads and leave the backbone as it is",
        "heads:training",
        _LOGITS,
    ),
    Check(
        "export",
        "heads",
        "heads that are exported, merged and loaded give the same T and P bit for bit",
        "heads:export",
        _LOGITS,
    ),
    Check(
        "perturbation",
        "logits",
        "each stored tensor, changed alone, moves the logits of every engine, and alike",
        "perturbation:each_tensor",
        (*_LOGITS, "logits-megatron"),
    ),
    Check(
        "ranks",
        "logits",
        "tensor, pipeline and expert parallel processes give the logits of one",
        "ranks:layouts_of_two",
        (*_LOGITS, "logits-megatron"),
    ),
    Check(
        "landing",
        "weight map",
        "on all ranks of each published preset's layout, every tensor lands once in each copy",
        "maps:landing",
        _DATA,
        costly=True,
    ),
)


def check_named(name: str) -> Check:
    """Returns a check by its name.

    Raises:
        UsageError: There is none; the message lists them.
    """
    for check in CHECKS:
        if check.name == name:
            return check
    raise UsageError(
        f"no check {name!r}", fix="use one of " + ", ".join(check.name for check in CHECKS)
    )
