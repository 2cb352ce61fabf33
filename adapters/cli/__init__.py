"""The command `fluxion`."""

from __future__ import annotations

from typing import Any

import click

from adapters.cli.console import plain, replace_what_cannot_be_encoded
from adapters.cli.convert import convert
from adapters.cli.demo.command import demo
from adapters.cli.diff import diff
from adapters.cli.inspect import inspect
from adapters.cli.merge import merge
from adapters.cli.pull import pull
from adapters.cli.push import push
from adapters.cli.tree import tree

# What a command needs beyond this package, which brings torch, it imports when it runs.


class Commands(click.Group):
    """Commands that end expected errors in one clear line, and Ctrl-C with the shell's code for it."""

    def invoke(self, ctx: click.Context) -> Any:
        replace_what_cannot_be_encoded()
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("Aborted!", err=True)
            ctx.exit(130)
        except BrokenPipeError:  # Who reads has enough; click ends quietly.
            raise
        except Exception as error:
            if isinstance(error, _expected_errors()):
                failure = getattr(self.commands.get(str(ctx.invoked_subcommand)), "failure", click.ClickException)
                raise failure(plain(" ".join(str(error).split()))) from error
            raise


def _expected_errors() -> tuple[type[Exception], ...]:
    """What can go wrong without a fault in the program; the messages say what to do."""
    from adapters.errors import AdapterError
    from fluxion.errors import ChainError
    from weights.errors import WeightsError

    return AdapterError, ChainError, WeightsError, OSError


@click.group(cls=Commands)
@click.version_option(package_name="fluxion-adapters", prog_name="fluxion")
def main() -> None:
    """Adapters for any PyTorch model: inject, toggle, merge, eject without a trace, publish."""


for command in (demo, inspect, convert, merge, tree, diff, pull, push):
    main.add_command(command)
