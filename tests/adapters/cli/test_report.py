from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import weights
from tests.adapters.cli.files import MINILM, document, done, fluxion, refused, serve, two_methods
from tests.processes import COMMAND, start
from tests.weights.hub_server import HubServer


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return tmp_path / "page.html"


def test_a_page(style: Path, page: Path) -> None:
    told = done("report", style, "--base", MINILM, "--output", page)
    assert told.startswith(f"{page}: 1 adapter, 12 layers, ")
    text = page.read_text("utf-8")
    assert text.lstrip().startswith("<!doctype html>")
    assert "12 of 12 layers fit, and it would load" in text
    assert "attention.self" in text


def test_an_older_page_is_replaced_and_nothing_else(style: Path, kohya: Path, page: Path, tmp_path: Path) -> None:
    done("report", style, "--output", page)
    done("report", kohya, "--output", page)
    assert '<h1 id="title">kohya</h1>' in page.read_text("utf-8")
    other = tmp_path / "notes.html"
    other.write_text("<html>mine</html>")
    assert "is not a report: choose another --output" in refused("report", style, "--output", other)
    assert other.read_text() == "<html>mine</html>"
    assert "end it with .html" in refused("report", style, "--output", tmp_path / "style.safetensors")


def test_where_it_is_written_by_default(kohya: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done("report", kohya)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_facts(style: Path, kohya: Path, page: Path) -> None:
    told = document("report", style, kohya, "--base", MINILM, "--output", page)
    assert not page.exists()
    assert told["base"] == str(MINILM)
    one, other = told["adapters"]
    assert (one["name"], one["format"], one["parameters"], one["dtypes"]) == (
        "style",
        "peft",
        36864,
        {"float32": 36864},
    )
    assert (other["name"], other["format"], other["metadata"]["ss_network_dim"]) == ("kohya", "lycoris", "4")
    assert [layer["path"] for layer in one["layers"]] == [layer["path"] for layer in other["layers"]]
    layer = next(layer for layer in one["layers"] if layer["path"] == "encoder.layer.5.attention.self.query")
    content = weights.read_adapter(style).layers["encoder.layer.5.attention.self.query"].tensors
    update = 2 * content["lora_B"].double() @ content["lora_A"].double()
    weight = weights.open(MINILM)["encoder.layer.5.attention.self.query.weight"].double()
    assert (layer["shape"], len(layer["singular_values"])) == ([384, 384], 4)
    assert layer["norm"] == pytest.approx(float(update.norm()))
    assert layer["relative"] == pytest.approx(float(update.norm() / weight.norm()))
    assert (len(one["fit"]["loads"]), one["fit"]["refused"], one["fit"]["unchecked"]) == (12, [], [])
    (overlap,) = told["overlaps"]
    assert overlap["cosine"] == pytest.approx(1)
    assert "embeddings.word_embeddings" in told["untouched"]


def test_a_wrong_base(style: Path, page: Path, tmp_path: Path) -> None:
    base = weights.save({"encoder.layer.0.attention.self.query.weight": torch.ones(8, 8)}, tmp_path / "x.safetensors")
    fit = document("report", style, "--base", base)["adapters"][0]["fit"]
    assert fit["loads"] == []
    assert len(fit["refused"]) == 12
    assert fit["refused"][-1].startswith("encoder.layer.0.attention.self.query: lora_A is (4, 384) in the file, (4, 8)")
    done("report", style, "--base", base, "--output", page)
    assert "0 of 12 layers fit; 12 problems" in page.read_text("utf-8")


def test_on_the_hub(hub: HubServer, small: Path, page: Path) -> None:
    serve(hub, "someone/style-lora", small / "style")
    serve(hub, "someone/model", small / "model")
    done("report", "someone/style-lora", "--base", "someone/model", "--output", page)
    assert "4 of 4 layers fit" in page.read_text("utf-8")


def test_several_methods(tmp_path: Path) -> None:
    layers = {
        layer["path"]: layer for layer in document("report", two_methods(tmp_path / "own"))["adapters"][0]["layers"]
    }
    assert layers["a"]["hyperparameters"]["rank"] == 2
    assert layers["norm.weight" if "norm.weight" in layers else "norm"]["note"]


@pytest.mark.parametrize("source", [MINILM, "nothing.safetensors"])
def test_what_is_no_adapter(source: object, page: Path) -> None:
    assert str(source) in refused("report", source, "--output", page)
    assert not page.exists()


def test_what_is_no_base(style: Path, page: Path) -> None:
    assert "nothing.safetensors" in refused("report", style, "--base", "nothing.safetensors", "--output", page)


def test_a_file_that_is_damaged(kohya: Path, page: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(kohya.read_bytes()[:-1])
    assert "cut.safetensors" in refused("report", path, "--output", page)
    assert not page.exists()


def test_no_source_is_a_usage_error() -> None:
    assert fluxion("report").exit_code == 2


def test_ctrl_c_leaves_the_old_page(style: Path, page: Path, tmp_path: Path) -> None:
    done("report", style, "--output", page)
    before = page.read_bytes()
    file = weights.read_adapter(style)
    many = {f"{path}.{number}": layer for path, layer in file.layers.items() for number in range(500)}
    weights.write_adapter(replace(file, layers=many), tmp_path / "large.safetensors", "fluxion")
    terminal, its_side = os.openpty()
    command = (COMMAND, "report", tmp_path / "large.safetensors", "--output", page)
    running = start(*command, settings={"TERM": "xterm"}, stderr=its_side)
    os.close(its_side)
    shown = b""
    while b"Measuring" not in shown:
        shown += os.read(terminal, 4096)
    running.send_signal(signal.SIGINT)
    assert running.wait() == 130
    with os.fdopen(terminal, "rb", buffering=0) as rest, contextlib.suppress(OSError):  # It has hung up.
        while more := rest.read(4096):
            shown += more
    assert shown.endswith(b"Aborted!\r\n")
    assert page.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large.safetensors", "page.html"]
