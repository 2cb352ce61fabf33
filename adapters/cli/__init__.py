"""The command `fluxion`."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

import click

from adapters.cli.combine import combine
from adapters.cli.console import plain, replace_what_cannot_be_encoded
from adapters.cli.convert import convert
from adapters.cli.damage import damage
from adapters.cli.demo.command import demo
from adapters.cli.diff import diff
from adapters.cli.doctor import doctor
from adapters.cli.extract import extract
from adapters.cli.inspect import inspect
from adapters.cli.merge import merge
from adapters.cli.pull import pull
from adapters.cli.push import push
from adapters.cli.report import report
from adapters.cli.resize import resize
from adapters.cli.tree import tree

# What a command needs beyond click it imports when it runs: torch takes seconds.

_FAULT, _INTERRUPTED, _NO_READER = 70, 130, 141  # Codes at the end, as of sysexits.h and of shells.
_EXPECTED = {"adapters.errors": "AdapterError", "fluxion.errors": "ChainError", "weights.errors": "WeightsError"}


class Commands(click.Group):
    """Commands that end expected errors in one clear line, and Ctrl-C with the shell's code for it."""

    def invoke(self, ctx: click.Context) -> Any:
        replace_what_cannot_be_encoded()
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.exceptions.Abort):
            raise
        except click.ClickException as error:
            error.message = _line(error.message)  # type: ignore[misc]  # A path in it may have line breaks.
            raise
        except KeyboardInterrupt:
            click.echo("Aborted!", err=True)
            ctx.exit(_INTERRUPTED)
        except BrokenPipeError:  # Who reads has enough; what is left would make Python complain when it ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(_NO_READER)
        except Exception as error:
            known = str(error) if _is_expected(error) else damage()
            if known is not None:
                failure = getattr(self.commands.get(str(ctx.invoked_subcommand)), "failure", click.ClickException)
                raise failure(_line(known)) from error
            traceback.print_exc()
            click.echo("This is a fault of fluxion, not of what it was given.", err=True)
            ctx.exit(_FAULT)


def _line(text: str) -> str:
    """A message in one line, without anything that a terminal would obey."""
    return plain(" ".join(text.split()))


def _is_expected(error: Exception) -> bool:
    """Whether this can go wrong without a fault in the program; the message then says what to do."""
    # What was never imported has raised nothing.
    raised = (getattr(sys.modules[module], name) for module, name in _EXPECTED.items() if module in sys.modules)
    return isinstance(error, (OSError, *raised))


_EPILOG = """\b
The code at the end says how it went:
  0    done; for diff: the same
  1    refused or failed, with one line that says why; for diff: different; for doctor: something is wrong
  2    the command line is wrong; for diff also: these cannot be compared
  70   a fault of fluxion itself, with a traceback
  130  stopped by Ctrl-C
  141  what reads the output, as head does, has closed it

\b
Completion, in the settings of your shell, for bash, zsh or fish:
  eval "$(_FLUXION_COMPLETE=bash_source fluxion)"
  eval "$(_FLUXION_COMPLETE=zsh_source fluxion)"
  _FLUXION_COMPLETE=fish_source fluxion | source
"""


@click.group(cls=Commands, epilog=_EPILOG)
@click.version_option(package_name="fluxion-adapters", prog_name="fluxion")
def main() -> None:
    """Adapters for any PyTorch model: inject, toggle, merge, eject without a trace, publish."""


for command in (demo, inspect, convert, merge, extract, resize, combine, tree, diff, report, pull, push, doctor):
    main.add_command(command)
