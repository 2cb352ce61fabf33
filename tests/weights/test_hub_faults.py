"""Every request to the Hub, made to fail in every way: one clear error, nothing half done, nothing spoilt."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http

import weights
from tests.thinned import exhaustive
from tests.weights.hub_server import FAULTS, WRITER, Fault, HubServer
from tests.weights.test_hub import contents, folder, serve

__all__ = ["folder"]  # a fixture


@pytest.fixture(autouse=True)
def without_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client tries again at once."""
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))


def number_of_requests(hub: HubServer, run: Callable[[], object]) -> int:
    hub.counted = count()
    run()
    return next(hub.counted)


every = pytest.mark.parametrize("step", [3, exhaustive(1)])


def plans(number: int, step: int) -> Iterator[dict[int, Fault]]:
    """Every request, or one in `step`, failing in each way, and everything failing from there on."""
    for n in range(0, number, step):
        yield from ({n: fault} for fault in FAULTS)
        yield dict.fromkeys(range(n, n + 100), "drop")
        yield dict.fromkeys(range(n, n + 100), 503)


def under(hub: HubServer, plan: dict[int, Fault], run: Callable[[], object]) -> bool:
    """Whether `run` succeeds while requests fail as planned; if not, it must do so with one clear error."""
    hub.counted, hub.faults = count(), plan
    try:
        run()
    except weights.WeightsError as error:
        text = str(error)
        assert WRITER not in text
        assert "\n" not in text
        return False
    finally:
        hub.faults = {}
    return True


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    numbers = count()
    return lambda: monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / f"cache{next(numbers)}"))


@every
def test_downloads(hub: HubServer, folder: Path, fresh_cache: Callable[[], None], step: int) -> None:
    serve(hub, folder)

    def right() -> None:
        assert contents(weights.download("me/style", token=WRITER)) == contents(folder)

    number = number_of_requests(hub, right)
    outcomes = []
    for plan in plans(number, step):
        fresh_cache()
        outcomes.append(under(hub, plan, right))
        right()
    assert {True, False} == set(outcomes)


@every
def test_lazy_reads(hub: HubServer, folder: Path, fresh_cache: Callable[[], None], step: int) -> None:
    serve(hub, folder)
    expected = dict(weights.open(folder))

    def right() -> None:
        read = dict(weights.open("me/style", token=WRITER))
        assert read.keys() == expected.keys()
        assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())

    number = number_of_requests(hub, right)
    for plan in plans(number, step):
        fresh_cache()
        under(hub, plan, right)
        right()


@every
@pytest.mark.parametrize("part_size", [None, 100])
def test_publishing(
    hub: HubServer, folder: Path, fresh_cache: Callable[[], None], part_size: int | None, step: int
) -> None:
    hub.part_size = part_size
    sent = contents(folder)

    def run() -> None:
        weights.publish(folder, "me/style", token=WRITER)

    number = number_of_requests(hub, run)
    for plan in plans(number, step):
        hub.repos.clear()
        hub.large.clear()
        hub.parts.clear()
        succeeded = under(hub, plan, run)
        commits = hub.repos["me/style"].commits if hub.repos else []
        assert len(commits) <= 2
        if succeeded or len(commits) == 2:
            published = {name: file.content for name, file in commits[-1][1].items()}
            assert published == {".gitattributes": published[".gitattributes"], **sent}
        elif commits:
            assert commits[0][1].keys() == {".gitattributes"}
