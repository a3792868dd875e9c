"""The command line: parse, call, print."""

from __future__ import annotations

import errno
import os
import sys
import traceback
import warnings

import click

from autodeco import __version__
from autodeco.cli.converting import add_conversion_commands
from autodeco.cli.doctoring import doctor
from autodeco.cli.fetching import fetch
from autodeco.cli.launching import launch
from autodeco.cli.planning import plan
from autodeco.cli.plugins import plugin_group
from autodeco.cli.scaffolding import new_plugin
from autodeco.cli.stages import add_stage_commands
from autodeco.cli.tools import add_tool_commands
from autodeco.errors import EXIT_CODES, AutodecoError, EnvironmentProblem, StoppedEarly
from autodeco.processes import rank

_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: " + "; ".join(f"{code} {text}" for code, text in EXIT_CODES.items()),
)
@click.version_option(__version__, prog_name="autodeco")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Teach a frozen language model its own temperature and top-p, token by token.

    Example: autodeco run --plugin FAMILY
    """
    context.obj = {"debug": debug}


plugin_group.add_command(new_plugin)
cli.add_command(plugin_group)
cli.add_command(plan)
cli.add_command(doctor)
cli.add_command(launch)
cli.add_command(fetch)
add_stage_commands(cli)
add_conversion_commands(cli)
add_tool_commands(cli)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits; see `autodeco.errors.EXIT_CODES`."""
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given
    if not sys.stderr.isatty():  # bars of transformers and of the hub are for a terminal
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # megatron-core lists at each import what it does without; `autodeco doctor` says it once
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    try:
        cli.main(args=given, prog_name="autodeco", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except StoppedEarly as stopped:
        if not stopped.agreed or rank() == 0:
            click.echo(f"stopped early: {stopped}; run the same command again", err=True)
        sys.exit(stopped.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; the same command continues", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # the reader of our output (head, less) has gone; say nothing at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if debug:
            traceback.print_exc()
        sys.exit(_explain(error))


def _explain(error: Exception) -> int:
    """Says what went wrong and what to do; returns the exit code."""
    known = error if isinstance(error, AutodecoError) else _problem_of_the_machine(error)
    if known is not None:
        if not known.agreed or rank() == 0:
            click.echo(f"error: {known}", err=True)
        return known.exit_code
    click.echo(f"error: a defect of autodeco: {type(error).__name__}: {error}", err=True)
    click.echo("  do: run again as `autodeco --debug ...` and report the traceback", err=True)
    return 1


def _problem_of_the_machine(error: Exception) -> EnvironmentProblem | None:
    """What no line of ours foresaw, but is the machine's doing all the same."""
    if isinstance(error, OSError) and error.errno in _MACHINE:
        return EnvironmentProblem(
            error.strerror or str(error),
            where=str(error.filename) if error.filename else None,
            fix="free some space or make it writable, then run the same command again",
        )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return EnvironmentProblem(
            f"out of memory: {str(error).splitlines()[0] if str(error) else 'no more to be had'}",
            fix="lower --micro-batch-tokens or --max-length, then run the same command again",
        )
    return None
