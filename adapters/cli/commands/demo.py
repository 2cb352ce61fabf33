"""`fluxion demo`: its options, and their checks before any work is done."""

from __future__ import annotations

from pathlib import Path

import click

from adapters.cli.demo.destination import Destination, Folder, HubRepo

_DEFAULT_FOLDER = Path("fluxion-demo")


@click.command()
@click.option(
    "--output",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help=f"Where to save the adapter: a new or empty folder, or that of an earlier demo.  [default: {_DEFAULT_FOLDER}]",
)
@click.option("--repo", metavar="USER/NAME", help="Publish to this repository on the Hugging Face Hub instead.")
@click.option("--private", is_flag=True, help="Make that repository a private one.")
def demo(output: Path | None, repo: str | None, private: bool) -> None:
    """Adapt a digit classifier: train, toggle, mix, eject, publish.

    Takes less than a minute and needs no network: the digits and the classifier are part of the package.
    """
    destination = _destination(output, repo, private)
    destination.check()

    from adapters.cli.demo.story import tell

    tell(destination)


def _destination(output: Path | None, repo: str | None, private: bool) -> Destination:
    if repo is not None:
        if output is not None:
            raise click.UsageError("--repo publishes instead of saving to --output: give one of the two.")
        return HubRepo(repo, private)
    if private:
        raise click.UsageError("--private needs a repository: give --repo too.")
    return Folder(output or _DEFAULT_FOLDER)
