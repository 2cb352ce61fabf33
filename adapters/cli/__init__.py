"""The command `fluxion`."""

from __future__ import annotations

import os
import pkgutil
import sys
import traceback
from importlib import import_module
from typing import Any

import click

from adapters.cli import commands
from adapters.cli.console import plain, replace_what_cannot_be_encoded
from adapters.cli.damage import damage

# Commands import everything but click when they run: torch takes seconds.

_FAULT, _INTERRUPTED, _NO_READER = 70, 130, 141  # Exit codes, as of sysexits.h and of shells.
_EXPECTED = {"adapters.errors": "AdapterError", "fluxion.errors": "ChainError", "weights.errors": "WeightsError"}


class Commands(click.Group):
    """Group of commands that prints an expected error in one line, and exits with the shell's code after Ctrl-C."""

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
        except BrokenPipeError:  # Python would fail again when it flushes the rest at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(_NO_READER)
        except Exception as error:
            known = str(error) if _is_expected(error) else damage()
            if known is not None:
                failure = getattr(self.commands.get(str(ctx.invoked_subcommand)), "failure", click.ClickException)
                raise failure(_line(known)) from error
            traceback.print_exc()
            click.echo("This is an internal error of fluxion, not of its input.", err=True)
            ctx.exit(_FAULT)


def _line(text: str) -> str:
    """A message in one line, without control characters."""
    return plain(" ".join(text.split()))


def _is_expected(error: Exception) -> bool:
    """Whether an error is one of input or of the system, whose message says what to do."""
    # A module that was never imported has raised nothing.
    raised = (getattr(sys.modules[module], name) for module, name in _EXPECTED.items() if module in sys.modules)
    return isinstance(error, (OSError, *raised))


_EPILOG = """\b
Exit codes:
  0    success; for diff: no differences
  1    failure, explained in one line; for diff: differences; for doctor: problems
  2    wrong usage; for diff also: the two cannot be compared
  70   an internal error of fluxion, with a traceback
  130  interrupted by Ctrl-C
  141  the reader of the output, such as head, has closed it

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


for module in pkgutil.iter_modules(commands.__path__):
    main.add_command(getattr(import_module(f"{commands.__name__}.{module.name}"), module.name))
