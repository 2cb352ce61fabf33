"""`fluxion push`: an adapter, or any folder, to the Hub."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from adapters.cli.console import print_json
from adapters.cli.options import Source, as_json


@click.command()
@click.argument("source", metavar="FOLDER_OR_FILE", type=Source())
@click.argument("repo_id")
@click.option("--private", is_flag=True, help="Make the repository private.")
@click.option("--revision", metavar="BRANCH", help="The branch to commit to.  [default: the main branch]")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead.")
@click.option("--message", metavar="TEXT", help="The commit message.")
@click.option("--license", "license", metavar="KEY", help="The license in the model card, such as mit.")
@click.option("--tag", "tags", metavar="TAG", multiple=True, help="A tag in the model card; can be repeated.")
@click.option("--dry-run", is_flag=True, help="Print the files that would be sent, and send nothing.")
@as_json
def push(
    source: str,
    repo_id: str,
    private: bool,
    revision: str | None,
    create_pr: bool,
    message: str | None,
    license: str | None,
    tags: Sequence[str],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Publish an adapter on the Hub in one commit.

    Prints the URL of the commit.

    A folder is published without its hidden files. An adapter without a model card, such as a lone file, gets one; an
    existing card gets the license and the tags. Nothing changes on this machine. The repository and the branch are
    created if they do not exist. All files are checked before the commit, and compared with the Hub's after it.

    \b
    Example:
      fluxion push style.safetensors me/style-lora --license mit
    """
    import weights

    with _prepared(Path(source), repo_id, license, tags) as folder:
        answer = weights.publish(
            folder,
            repo_id,
            private=private or None,
            revision=revision,
            create_pr=create_pr,
            commit_message=message or f"Upload {repo_id.rpartition('/')[2]}",
            dry_run=dry_run,
        )
    if as_json:
        done = {"plan": answer} if dry_run else {"url": answer}
        print_json({"source": source, "repo_id": repo_id, "revision": revision, "dry_run": dry_run, **done})
    else:
        click.echo(answer)


@contextmanager
def _prepared(source: Path, repo_id: str, license: str | None, tags: Sequence[str]) -> Iterator[Path]:
    """Folder to publish: the source, or a temporary copy whose model card has the license and the tags."""
    import weights
    from weights.hub.card import CARD
    from weights.hub.publish import files_in

    has_card = (source / CARD).is_file()
    if has_card and not license and not tags:
        yield source
        return
    if has_card:
        card = _with_fields(source / CARD, license, tags)
    else:
        adapter = weights.read_adapter(source)
        card = weights.model_card(adapter, str(adapter.format), repo_id=repo_id, license=license, tags=tags)
    files = files_in(source) if source.is_dir() else _belonging(source, str(adapter.format))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "adapter"
        for name, path in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
        (folder / CARD).write_text(card, encoding="utf-8")
        yield folder


def _with_fields(path: Path, license: str | None, tags: Sequence[str]) -> str:
    """Text of a model card with another license, and more tags."""
    from huggingface_hub import ModelCard

    from weights.hub.card import check_card

    check_card(path)
    card = ModelCard(path.read_text(encoding="utf-8"))
    if license:
        card.data["license"] = license
    if tags:
        card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or []), *tags]))
    return str(card)


def _belonging(file: Path, format: str) -> dict[str, Path]:
    """A file of an adapter, and the settings files beside it that its format needs, by name."""
    from weights.formats import formats

    beside = (path for name in formats()[format].files if (path := file.with_name(name)).is_file())
    return {path.name: path for path in (file, *beside)}
