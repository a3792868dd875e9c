"""Where a conversion works until its output is complete."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autodeco.errors import AutodecoError
from autodeco.files import (
    PARTIAL_SUFFIX,
    atomic_write_json,
    make_directory,
    publish,
    read_json,
    read_object,
    remove,
    remove_partial,
)
from autodeco.heads.places import check_places
from autodeco.lock import FileLock, forget_output_lock, output_lock

_PLAN = "plan.json"
_RESULT = "result"


@dataclass(frozen=True)
class WorkingDirectory:
    """A hidden directory beside the output, and the lock on it.

    Attributes:
        output: The directory to appear.
        what: What is done, for the directory's name and for messages: "cast".
    """

    output: Path
    what: str

    @property
    def path(self) -> Path:
        """Returns the directory; what is no part of the output may lie in it."""
        return self.output.with_name(f".{self.output.name}.{self.what}")

    @property
    def result(self) -> Path:
        """Returns what becomes the output."""
        return self.path / _RESULT

    @property
    def plan(self) -> Path:
        """Returns the file that says what is being done; it is there before all the others."""
        return self.path / _PLAN

    def lock(self) -> FileLock:
        """Takes the lock.

        Raises:
            RunError: Another process has it.
            EnvironmentProblem: It cannot be made.
        """
        make_directory(self.output.parent)
        return output_lock(self.output, f"the {self.what}")

    def make_once(self, manifest: str, source: str, base: Path, work: Callable[[], object]) -> bool:
        """Does the work under the lock, unless its output is there.

        Args:
            manifest: The file in the output that `was_made` reads.
            source: The digest that it has when the work was done.
            base: What is read; it and the output must not lie within one another.
            work: Writes `result` and publishes it.

        Returns:
            Whether it was done now.

        Raises:
            UsageError: The output is something else, or lies within `base`.
            RunError: Another process is at it.
            EnvironmentProblem: It cannot be written.
        """
        made = self.output / manifest
        if was_made(made, source):
            self.clear()
            return False
        check_places(base, self.output)
        lock = self.lock()
        try:
            if was_made(made, source):  # by another process, until this one had the lock
                return False
            work()
            return True
        finally:
            lock.remove()

    def begin(self, plan: Mapping[str, Any], *folders: str) -> None:
        """Makes the directory, or takes over one that a killed process left of the same plan.

        Args:
            plan: JSON; what was begun by another is removed.
            *folders: To be made in it.

        Raises:
            EnvironmentProblem: It cannot be written.
        """
        if self.path.exists() and not self._is_of(plan):
            remove(self.path)
        for folder in (_RESULT, *folders):
            make_directory(self.path / folder)
        for root, _, _ in os.walk(self.path):
            remove_partial(Path(root))
        atomic_write_json(self.plan, plan)

    def _is_of(self, plan: Mapping[str, Any]) -> bool:
        try:
            return bool(read_json(self.plan) == plan)
        except AutodecoError:  # not there, or not whole
            return False

    def publish(self) -> None:
        """Gives the result its name, and removes the rest.

        Raises:
            EnvironmentProblem: It cannot be synced or renamed.
        """
        publish(self.result, self.output)
        self.clear()

    def clear(self) -> None:
        """Removes what a process left that was killed when the output was complete."""
        with contextlib.suppress(AutodecoError):
            remove(self.path)
        # `remove` renames first: a process may have been killed behind that
        for left in self.output.parent.glob(f".{self.path.name}.*{PARTIAL_SUFFIX}"):
            with contextlib.suppress(AutodecoError):
                remove(left)
        forget_output_lock(self.output)


def was_made(manifest: Path, source: str) -> bool:
    """Whether a conversion of this source is complete, by the manifest in its output.

    Args:
        manifest: A JSON object, written last.
        source: The digest that it should have.

    Raises:
        WeightsError: The manifest cannot be read.
    """
    return manifest.is_file() and read_object(manifest).get("source") == source
