"""The examples in each command's --help, and those of the README, run."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel

import adapters
from adapters.cli import main
from tests.adapters.cli.files import by_kohya, by_peft, done, fluxion, serve
from tests.weights.hub_server import WRITER, HubServer

README = Path(__file__).parents[3] / "README.md"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model like MiniLM, one tuned from it, and adapters for it."""
    folder = tmp_path_factory.mktemp("made")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=100, **sizes)).save_pretrained(folder / "model")
    by_kohya(folder / "style.safetensors", by_peft(folder / "style", folder / "model"))
    adapters.merge_files(folder / "model", {folder / "style": 1.0}, folder / "tuned")
    return folder


@pytest.fixture
def place(hub: HubServer, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the examples are about, and a Hub with the rest."""
    serve(hub, "someone/style-lora", made / "style")
    serve(hub, "someone/model", made / "model")
    serve(hub, "someone/tuned-model", made / "tuned")
    folder = tmp_path / "place"
    folder.mkdir()
    shutil.copy(made / "style.safetensors", folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    return folder


def run(text: str) -> list[str]:
    """Run each line that begins with the command. Returns the commands' names."""
    lines = [shlex.split(line, comments=True)[1:] for line in text.splitlines() if line.strip().startswith("fluxion ")]
    for arguments in lines:
        assert fluxion(*arguments).exit_code == 0, arguments
    return [arguments[0] for arguments in lines]


@pytest.mark.parametrize("name", sorted({*main.commands} - {"demo"}))
def test_of_help(place: Path, name: str) -> None:
    examples = re.split(r"Examples?:", done(name, "--help"))[1]
    assert set(run(examples)) == {name}


def test_of_the_readme(place: Path) -> None:
    section = README.read_text().split("## From the shell")[1].split("\n## ")[0]
    assert set(run(section)) == {*main.commands} - {"demo"}
