"""`fluxion pull`: an adapter or a repository from the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from adapters.cli.options import Source

_AT_ONCE = 1 << 20  # bytes


@click.command()
@click.argument("source", type=Source())
@click.argument("destination", required=False, type=click.Path(path_type=Path))
@click.option("--revision", metavar="REVISION", help="A branch, a tag or a commit.  [default: the main branch]")
def pull(source: str, destination: Path | None, revision: str | None) -> None:
    """Download from the Hub, check the hashes, and print the path.

    SOURCE is user/repo, user/repo@revision, user/repo:folder/file, an hf:// URL or the URL of a page. safetensors and
    text files are downloaded, pickles only by name, and each is checked against its published hash. They stay in the
    Hub's cache, and are copied into the folder DESTINATION if it is given, where files of the same names are replaced,
    all or none.

    \b
    Example:
      fluxion pull someone/style-lora style
    """
    import weights

    if destination is not None and destination.is_file():
        raise click.ClickException(f"{destination} is a file: give the name of a folder.")
    path = weights.download(source, revision=revision)
    if destination is not None:
        path = _copied(path, destination)
    click.echo(path)


def _copied(path: Path, destination: Path) -> Path:
    """Copy a file, or the files in a folder, into another folder. Returns the path of the copy."""
    from fnmatch import fnmatch

    from weights.disk.atomic import write_files
    from weights.hub.download import SAFE_FILES

    if path.is_file():
        write_files({destination / path.name: _chunks(path)})
        return destination / path.name
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    wanted = [file for file in files if any(fnmatch(file.name, pattern) for pattern in SAFE_FILES)]
    write_files({destination / file.relative_to(path): _chunks(file) for file in wanted})
    return destination


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_AT_ONCE):
            yield chunk
