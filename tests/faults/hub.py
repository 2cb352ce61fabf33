"""A Hub in a process of its own, which lives on where its clients are killed."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping
from contextlib import redirect_stderr
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from huggingface_hub import constants, logging
from tqdm import tqdm

from tests.weights.hub_server import HubServer


class Hub:
    """The process: `with Hub() as hub`, and the client of this process is pointed at it."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = dict(files)

    def __enter__(self) -> Self:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.files), daemon=True)
        self._process.start()
        url = self._pipe.recv()
        constants.ENDPOINT = url
        constants.HUGGINGFACE_CO_URL_TEMPLATE = url + "/{repo_id}/resolve/{revision}/{filename}"
        constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_PROGRESS_BARS = True
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            os.environ.pop(name, None)
        logging.set_verbosity_error()
        constants.HF_TOKEN_PATH = os.devnull
        tqdm.monitor_interval = 0  # It would be a thread, and what is forked has only one.
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join()

    def _ask(self, what: str) -> Any:
        self._pipe.send(what)
        return self._pipe.recv()

    def serve(self) -> None:
        """Have one repository, me/style."""
        self._ask("serve")

    def clear(self) -> None:
        """Have no repository."""
        self._ask("clear")

    def published(self) -> Mapping[str, bytes]:
        """The files of me/new that were published there."""
        found: Mapping[str, bytes] = self._ask("published")
        return found


def _serve(pipe: Connection, files: dict[str, bytes]) -> None:
    # Requests of clients that are killed are cut off, and nobody need hear of that.
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere), HubServer() as server:
        pipe.send(server.url)
        while True:
            what = pipe.recv()
            if what != "published":
                server.repos.clear()
                server.large.clear()
                server.parts.clear()
                if what == "serve":
                    server.add("me/style", files)
                pipe.send(None)
                continue
            repo = server.repos.get("me/new")
            found = repo.commits[-1][1] if repo and repo.commits else {}
            pipe.send({name: file.content for name, file in found.items() if name != ".gitattributes"})
