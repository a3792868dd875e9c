"""Errors that say who failed, what is wrong, where, and what to do next.

Every error that a user can cause or cure derives from `AutodecoError`; the command line prints it
without a traceback and exits with its `exit_code`. Anything else is a defect of ours.
"""

from __future__ import annotations

from typing import ClassVar


class AutodecoError(Exception):
    """Base of all errors that a user can act on.

    Args:
        what: What is wrong, in one sentence.
        who: The plugin, distribution or stage that found it.
        where: The file, line, tensor or option concerned.
        fix: What to do next.
    """

    exit_code: ClassVar[int] = 1
    agreed = False  # whether all ranks raise it together; rank 0 then says it for all

    def __init__(
        self, what: str, *, who: str | None = None, where: str | None = None, fix: str | None = None
    ) -> None:
        super().__init__(what)
        self.what = what
        self.who = who
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        head = f"{self.who}: {self.what}" if self.who else self.what
        lines = [head]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  do: {self.fix}")
        return "\n".join(lines)


class UsageError(AutodecoError):
    """An option or a combination of options that cannot be meant (exit code 2)."""

    exit_code = 2


class PluginError(AutodecoError):
    """A plugin is missing, broken, doubled, or of another api (exit code 3)."""

    exit_code = 3


class DataError(AutodecoError):
    """A data file or a tokenizer cannot be used (exit code 4)."""

    exit_code = 4


class WeightsError(AutodecoError):
    """A checkpoint, a weight map or a heads file cannot be used (exit code 5)."""

    exit_code = 5


class RunError(AutodecoError):
    """A run directory is locked, foreign, or cannot be continued (exit code 6)."""

    exit_code = 6


class EnvironmentProblem(AutodecoError):
    """The machine lacks something: a package, disk space, a permission (exit code 7)."""

    exit_code = 7


class NumericsError(AutodecoError):
    """A weight, a hidden state or a loss is not finite (exit code 8)."""

    exit_code = 8


class StoppedEarly(BaseException):
    """The run ends before its end, as it was asked to; the same command goes on (exit code 75).

    It is no `Exception`, as little as KeyboardInterrupt is one: nobody shall swallow it.

    Args:
        what: Why, and where.
        agreed: Whether all ranks end so, together.
    """

    exit_code: ClassVar[int] = 75

    def __init__(self, what: str, *, agreed: bool = False) -> None:
        super().__init__(what)
        self.agreed = agreed


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after a checkpoint, on all ranks together (exit code 130)."""

    agreed = True


EXIT_CODES: dict[int, str] = {
    0: "success",
    1: "a defect of autodeco (run again with --debug and report the traceback)",
    2: "wrong usage: an option, a configuration key or their combination",
    3: "a plugin is missing, broken, doubled, or made for another api",
    4: "a data file or a tokenizer cannot be used",
    5: "a checkpoint, a weight map or a heads file cannot be used",
    6: "the run directory is locked, or the run in it cannot be continued",
    7: "the machine lacks something: a package, disk space, a permission",
    8: "a weight, a hidden state or a loss is not finite",
    75: "stopped early with a checkpoint; run the same command again",
    130: "interrupted from the keyboard; the same command continues",
}
