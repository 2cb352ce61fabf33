"""Destination of the demo: a local folder laid out as a repository, or a repository on the Hub."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import click

if TYPE_CHECKING:
    from adapters import Patch

_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
_VISIBLE = "[!.]*"


class Destination(Protocol):
    """Place for one adapter."""

    @property
    def title(self) -> str:
        """Description in words."""

    @property
    def source(self) -> str:
        """Source for `adapters.load` to read the adapter back."""

    @property
    def code(self) -> str:
        """The call that publishes."""

    def check(self) -> None:
        """Check that publishing will be possible, before the work is done.

        Raises:
            click.ClickException: It will not be.
        """

    def publish(self, patch: Patch) -> list[str]:
        """Publish; returns lines with the files or the URL."""


@dataclass(frozen=True)
class Folder:
    """Folder on this machine."""

    path: Path

    @property
    def title(self) -> str:
        return f"the folder {self.path}, laid out as a Hub repository"

    @property
    def source(self) -> str:
        return str(self.path)

    @property
    def code(self) -> str:
        return f'save_pretrained("{self.path}")'

    def check(self) -> None:
        try:
            folder = self.path.resolve()
            nearest = next(path for path in (folder, *folder.parents) if path.exists())
            if not nearest.is_dir():
                raise click.ClickException(f"{nearest} is a file, not a folder: choose another --output.")
            with tempfile.TemporaryFile(dir=nearest):
                pass  # Only an attempt tells whether it is writable.
            # Hidden files are left alone: a Hub repository does not get them either.
            present = {path.name for path in folder.glob(_VISIBLE)}
        except OSError as error:
            reason = error.strerror or error
            raise click.ClickException(f"{self.path} cannot be written: {reason}; choose another --output.") from error
        if foreign := sorted(present - _FILES):
            raise click.ClickException(f"{self.path} holds other files, such as {foreign[0]}: choose a new --output.")
        if present and not self._is_of_a_demo():
            raise click.ClickException(f"{self.path} does not hold an adapter of this demo: choose a new --output.")

    def _is_of_a_demo(self) -> bool:
        """Whether the folder holds an adapter of the demo's classifier, which may be replaced."""
        import adapters
        import weights
        from adapters.cli.demo.model import load_model

        try:
            adapters.load(load_model(), self.path)
        except (adapters.AdapterError, weights.WeightsError):
            return False
        return True

    def publish(self, patch: Patch) -> list[str]:
        patch.save_pretrained(self.path)
        return [f"{path.name:<25} {path.stat().st_size:>8,} bytes" for path in sorted(self.path.glob(_VISIBLE))]


@dataclass(frozen=True)
class HubRepo:
    """Repository on the Hugging Face Hub."""

    repo_id: str
    private: bool

    @property
    def title(self) -> str:
        return f"the Hub repository {self.repo_id}"

    @property
    def source(self) -> str:
        return self.repo_id

    @property
    def code(self) -> str:
        return f'push_to_hub("{self.repo_id}")'

    def check(self) -> None:
        from huggingface_hub import get_token
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        try:
            validate_repo_id(self.repo_id)
            named = "/" in self.repo_id
        except HFValidationError:
            named = False
        if not named:
            raise click.ClickException(f"{self.repo_id!r} is not a repository id: write --repo user/name.")
        if get_token() is None:
            raise click.ClickException(
                f"Publishing to {self.repo_id} needs a token: run `hf auth login` or set HF_TOKEN."
            )

    def publish(self, patch: Patch) -> list[str]:
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        disable_progress_bars()  # Three small files need no bar.
        # Without --private the account's default applies, or the repository stays as it is.
        return [patch.push_to_hub(self.repo_id, private=self.private or None)]
