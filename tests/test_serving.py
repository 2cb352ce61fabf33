"""The example server, in a process of its own and under load: nobody is answered by another's adapter."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.thinned import exhaustive

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "examples" / "serve.py"
TEXTS = ("salt", "red leaves", "bees")
LAYERS = (4, 5)
NBYTES = len(LAYERS) * 2 * 384 * 4  # Of an adapter.
GROWTH = 24 * 2**20  # Of the server's memory, after the first requests.


@dataclass(frozen=True)
class Load:
    """Sizes of a test.

    Attributes:
        staying: How many adapters are there all the time.
        moving: How many come and go.
        spare: How many more those become that come again.
        each: Requests for each of them.
        moves: How often one of them comes or goes meanwhile.
        clients: How many ask at once.
        resident: How many adapters there is memory for, which is not enough for all.
    """

    staying: int
    moving: int
    spare: int
    each: int
    moves: int
    clients: int
    resident: int

    @property
    def budget(self) -> int:
        return self.resident * NBYTES


LOADS = [Load(60, 8, 4, 6, 30, 32, 45), exhaustive(Load(200, 16, 8, 10, 60, 64, 150))]


@pytest.fixture(scope="module")
def example() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("serve", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def factors(key: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Of an adapter, by layer: `(1, 384)` and `(384, 1)`."""
    random_numbers = torch.Generator().manual_seed(key)
    return {
        f"encoder.layer.{layer}.attention.self.value": (
            torch.randn(1, 384, generator=random_numbers) * 0.3,
            torch.randn(384, 1, generator=random_numbers) * 0.3,
        )
        for layer in LAYERS
    }


def write(key: int, folder: Path) -> None:
    """What PEFT would write, by hand."""
    folder.mkdir(exist_ok=True)
    tensors = {}
    for path, (down, up) in factors(key).items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = down
        tensors[f"base_model.model.{path}.lora_B.weight"] = up
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["value"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


@dataclass
class Served:
    """A running server, and what it should answer.

    Attributes:
        answers: What each adapter makes of the texts, by its key: computed without this library.
        history: Under each name, the keys of the adapters that were there, in order: None where there was none.
        settled: Which one of these it is at least, by now.
    """

    load: Load
    url: str
    process: subprocess.Popen[bytes]
    folder: Path
    answers: dict[int | None, Tensor]
    history: dict[str | None, list[int | None]]
    settled: dict[str | None, int] = field(default_factory=dict)

    def client(self) -> httpx.AsyncClient:
        """With connections of its own: many requests over those that are shared wait for each other."""
        return httpx.AsyncClient(base_url=self.url, timeout=60, verify=False)

    @property
    def memory(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024

    async def ask(self, client: httpx.AsyncClient, name: str | None, row: int) -> int:
        """Ask for one text, check that the answer is one that the name had in the meantime, and return its status."""
        since = self.settled.get(name, 0)
        response = await client.post("/embed", json={"text": TEXTS[row], "adapter": name})
        possible = self.history[name][since:]
        if response.status_code == 404 and name is not None:
            assert None in possible, name
            assert repr(name) in response.json()["detail"]
        else:
            assert response.status_code == 200, response.text
            embedding = torch.tensor(response.json()["embedding"])
            keys = possible if name is None else [key for key in possible if key is not None]
            assert any(torch.allclose(embedding, self.answers[key][row], atol=1e-4) for key in keys), (name, possible)
        return response.status_code

    async def change(self, client: httpx.AsyncClient, name: str, key: int | None) -> None:
        """Load an adapter under a name, or unload what is there; ask for it just after."""
        self.history[name].append(key)
        if key is None:
            response = await client.delete(f"/adapters/{name}")
        else:
            write(key, self.folder / name)
            response = await client.put(f"/adapters/{name}")
        assert response.is_success, response.text
        self.settled[name] = len(self.history[name]) - 1
        assert await self.ask(client, name, 0) == (404 if key is None else 200)


@torch.no_grad()
def expected(example: types.ModuleType, load: Load) -> dict[int | None, Tensor]:
    """What the base makes of the texts, and each adapter, where it is added to the weights by hand."""
    model, tokenizer = example.load_base()
    tokens = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    calls = []
    first, *others = model.encoder.layer[min(LAYERS) :]  # The layers before compute the same for all.
    first.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    model(**tokens)
    ((hidden, *args), kwargs) = calls[0]

    def embed() -> Tensor:
        output = hidden
        for layer in (first, *others):
            output = layer(output, *args, **kwargs)
        return nn.functional.normalize((output * tokens["attention_mask"].unsqueeze(-1)).sum(1), dim=-1)

    answers: dict[int | None, Tensor] = {None: embed()}
    for key in range(load.staying + load.moving + load.spare):
        changes = [(model.get_parameter(f"{path}.weight"), up @ down) for path, (down, up) in factors(key).items()]
        kept = [weight.clone() for weight, _ in changes]
        for weight, change in changes:
            weight.add_(change)
        answers[key] = embed()
        for (weight, _), before in zip(changes, kept, strict=True):
            weight.copy_(before)
    return answers


@pytest.fixture(scope="module", params=LOADS, ids=lambda load: str(load.staying))
def served(
    request: pytest.FixtureRequest, example: types.ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    torch.set_num_threads(1)
    load = request.param
    folder = tmp_path_factory.mktemp("adapters")
    for key in range(load.staying):
        write(key, folder / f"a{key}")
    history = {f"a{key}": [key if key < load.staying else None] for key in range(load.staying + load.moving)}
    log = tmp_path_factory.mktemp("log") / "server"
    command = [sys.executable, PROGRAM, folder, "--port", "0", "--budget", str(load.budget)]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        answers = expected(example, load)  # While it starts.
        deadline = time.monotonic() + 120
        while not (found := re.search(r"running on (http://[\d.:]+)", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield Served(load, found[1], process, folder, answers, {None: [None], **history})
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)
        assert "Application shutdown complete" in log.read_text() and "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()


def test_every_request_is_answered_by_its_own_adapter_while_others_come_and_go(served: Served) -> None:
    load, answers = served.load, torch.stack([*served.answers.values()])
    for row in range(len(TEXTS)):  # An answer tells which adapter has given it.
        distances = torch.cdist(answers[:, row], answers[:, row]).fill_diagonal_(1)
        assert distances.min() > 0.03

    chance = random.Random(0)
    statuses: dict[str | None, list[int]] = {name: [] for name in served.history}
    moving = [f"a{load.staying + number}" for number in range(load.moving)]
    free, memory = list(moving), []
    todo: list[str | None] = [*served.history] * load.each + ["move"] * load.moves
    chance.shuffle(todo)

    async def move(client: httpx.AsyncClient) -> None:
        """Load or unload one of those that come and go; each time another adapter comes under the name."""
        name = free.pop(chance.randrange(len(free)))
        key = chance.randrange(load.staying, load.staying + load.moving + load.spare)
        await served.change(client, name, key if served.history[name][-1] is None else None)
        free.append(name)
        state = (await client.get("/adapters")).json()
        assert state["nbytes"] <= load.budget == state["budget"] and len(state["resident"]) <= load.resident
        memory.append(served.memory)

    async def work() -> None:
        async with served.client() as client:
            while todo:
                if (name := todo.pop()) == "move":
                    await move(client)
                else:
                    statuses[name].append(await served.ask(client, name, chance.randrange(len(TEXTS))))

    async def ask() -> None:
        async with asyncio.timeout(240), asyncio.TaskGroup() as tasks:
            for _ in range(load.clients):
                tasks.create_task(work())

    asyncio.run(ask())
    assert sum(map(len, statuses.values())) == (load.staying + load.moving + 1) * load.each > 400
    assert all(statuses[name] == [200] * load.each for name in statuses if name not in moving)
    assert {200, 404} == {status for name in moving for status in statuses[name]}
    assert max(memory) < max(memory[: load.moves // 4]) + GROWTH


def test_what_is_wrong_with_a_request_is_said_in_a_sentence(served: Served) -> None:
    folder = served.folder
    (folder / "torn").mkdir()
    (folder / "torn" / "adapter_config.json").write_text((folder / "a0" / "adapter_config.json").read_text())
    whole = (folder / "a0" / "adapter_model.safetensors").read_bytes()
    (folder / "torn" / "adapter_model.safetensors").write_bytes(whole[:-100])
    (folder / "misfit").mkdir()
    for file in (folder / "a0").iterdir():
        (folder / "misfit" / file.name).write_bytes(file.read_bytes().replace(b"value", b"valve"))
    outside = folder.parent / "outside"
    write(0, outside)
    (folder / "link").symlink_to(outside)

    with httpx.Client(base_url=served.url, timeout=60) as client:

        def refused(status: int, message: str, method: str, path: str, **rest: object) -> None:
            response = client.request(method, path, **rest)
            assert response.status_code == status, response.text
            assert re.search(message, response.json()["detail"]), response.text

        refused(404, "no adapter 'none'", "POST", "/embed", json={"text": "salt", "adapter": "none"})
        refused(404, "no adapter 'none'", "DELETE", "/adapters/none")
        refused(404, "no folder 'none'", "PUT", "/adapters/none")
        refused(404, "no folder 'link'", "PUT", "/adapters/link")
        refused(404, "Not Found", "PUT", "/adapters/..%2Foutside")
        refused(422, "name: ", "PUT", "/adapters/..outside")
        refused(422, "body.adapter: ", "POST", "/embed", json={"text": "salt", "adapter": "../outside"})
        refused(409, "'a0' already", "PUT", "/adapters/a0")
        refused(400, "torn", "PUT", "/adapters/torn")
        refused(400, "no layer", "PUT", "/adapters/misfit")
        refused(422, "body.text: ", "POST", "/embed", json={"text": ""})
        refused(422, "body.text: ", "POST", "/embed", json={"text": "a" * 10_000})
        refused(422, "body", "POST", "/embed", content=b"{")
        assert client.post("/embed", content=b"a" * 100_000).status_code == 413
        for name in ("torn", "misfit", "link"):
            refused(404, f"no adapter '{name}'", "POST", "/embed", json={"text": "salt", "adapter": name})
        assert client.get("/health").json() == {"status": "ok", "waiting": 0}


def test_a_file_that_breaks_later_fails_for_those_who_ask_for_it_alone(served: Served) -> None:
    """In a batch with others that are sound."""
    write(0, served.folder / "broken")

    async def load() -> None:
        async with served.client() as client:
            assert (await client.put("/adapters/broken")).status_code == 201
            for start in range(0, served.load.staying, 20):  # It leaves the memory.
                await asyncio.gather(*(served.ask(client, f"a{start + step}", 0) for step in range(20)))
            (served.folder / "broken" / "adapter_model.safetensors").write_bytes(b"")
            broken = [client.post("/embed", json={"text": "salt", "adapter": "broken"}) for _ in range(3)]
            sound = [served.ask(client, f"a{number}", 1) for number in range(20)]
            refused, statuses = await asyncio.gather(asyncio.gather(*broken), asyncio.gather(*sound))
            assert [response.status_code for response in refused] == [400] * 3
            assert statuses == [200] * 20

    asyncio.run(load())


def test_a_full_queue_refuses(example: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "QUEUE", 3)
    app = example.application(tmp_path, 10_000)  # Not started: nothing leaves its queue.

    async def load() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            waiting = [asyncio.create_task(client.post("/embed", json={"text": "salt"})) for _ in range(3)]
            while (await client.get("/health")).json()["waiting"] < 3:
                await asyncio.sleep(0)
            response = await client.post("/embed", json={"text": "salt"})
            assert response.status_code == 503 and response.headers["retry-after"]
            assert response.json()["detail"] == "3 requests wait already: try again later."
            for task in waiting:
                task.cancel()

    asyncio.run(load())
