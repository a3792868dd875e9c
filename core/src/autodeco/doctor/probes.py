"""Everything that `autodeco doctor` looks at on one machine, each look in its own try."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from autodeco.doctor import machine, packages
from autodeco.doctor.report import PROBLEM, Row

Probe = Callable[[], Iterable[Row]]


def probes(out: Path) -> tuple[tuple[str, Probe], ...]:
    """Returns the probes in the order of the report.

    Args:
        out: Where runs are going to be written.
    """
    return (
        ("python", packages.python),
        ("autodeco", packages.autodeco),
        ("dependencies", packages.dependencies),
        ("plugins", packages.plugins),
        ("GPU", machine.gpus),
        ("torch", machine.torch),
        ("triton", packages.triton),
        ("megatron-core", packages.megatron),
        ("Transformer Engine", packages.transformer_engine),
        ("Apex", packages.apex),
        ("nemo_toolkit", packages.nemo),
        ("other packages", packages.others),
        ("disk", lambda: machine.disk(out)),
        ("shared memory", machine.shared_memory),
        ("output filesystem", lambda: machine.filesystem(out)),
    )


def examine(found: Iterable[tuple[str, Probe]]) -> list[Row]:
    """Runs probes; one that fails is a row of its own and stops no other."""
    rows: list[Row] = []
    for name, probe in found:
        try:
            rows.extend(probe())
        except (Exception, SystemExit) as error:  # a stranger's package may do anything
            said = f"this could not be found out: {type(error).__name__}: {error}"
            rows.append(Row(name, said, PROBLEM, "see whether it can be imported and used by hand"))
    return rows
