"""The conformance kit: what a plugin must do, checked from its data to its logits.

    class TestMyFamily(FamilyContract):
        plugin = "my_family"

is a whole test of a plugin; ``autodeco plugin check my_family`` runs the same checks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autodeco.testing.contract import FamilyContract

__all__ = ["FamilyContract"]


def __getattr__(name: str) -> Any:
    # pytest is no dependency of autodeco: who asks for the class has it
    if name == "FamilyContract":
        from autodeco.testing.contract import FamilyContract

        return FamilyContract
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
