"""`FamilyContract`: a whole test of a plugin, in two lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from autodeco.testing.checks import CHECKS, Check, NotRun
from autodeco.testing.layouts import LAYOUTS


class FamilyContract:
    """Subclass it, name the plugin, and pytest makes every check of `autodeco.testing.checks`.

    Attributes:
        plugin: The family's id.
        index: A ``model.safetensors.index.json`` of a published checkpoint, or, by preset, such a
            file or a list of tensor names.
        layouts: Layouts of two processes that the random presets are computed at.
        presets: Names of the random presets to compute with; empty: all.
        marks: Check -> a mark of pytest, as ``{"ranks": pytest.mark.slow}``.
        allow_not_run: What cannot be made here is skipped; by default it fails.
    """

    plugin: ClassVar[str]
    index: ClassVar[Path | str | Mapping[str, Path | str | Sequence[str]] | None] = None
    layouts: ClassVar[Sequence[str]] = LAYOUTS
    presets: ClassVar[Sequence[str]] = ()
    marks: ClassVar[Mapping[str, pytest.MarkDecorator]] = {}
    allow_not_run: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for check in CHECKS:
            if check.name in cls.marks:
                setattr(cls, _method(check), cls.marks[check.name](_test(check)))

    @pytest.fixture(scope="class")
    def context(
        self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[Any]:
        """The plugin under test, with what its checks share."""
        from autodeco.registry import Registry
        from autodeco.testing.context import Context, indexes

        kind = request.cls
        context = Context(
            Registry().get(kind.plugin),
            tmp_path_factory.mktemp(kind.plugin),
            presets=kind.presets,
            layouts=kind.layouts,
            index=indexes(kind.index),
        )
        yield context
        context.leave_groups()


def _method(check: Check) -> str:
    return "test_" + check.name.replace("-", "_")


def _test(check: Check) -> Callable[[FamilyContract, Any], None]:
    def test(self: FamilyContract, context: Any) -> None:
        from autodeco.testing.runner import perform

        try:
            perform(check, context)
        except NotRun as reason:
            if reason.excused or self.allow_not_run:
                pytest.skip(str(reason))
            raise

    test.__name__ = _method(check)
    test.__doc__ = f"{check.proves[0].upper()}{check.proves[1:]}."
    return test


for _check in CHECKS:
    setattr(FamilyContract, _method(_check), _test(_check))
