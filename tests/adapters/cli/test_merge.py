from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModel

import adapters
import weights
from tests.adapters.cli.files import MINILM, contents, document, done, fluxion, refused, serve
from tests.adapters.pipeline import pipeline
from tests.processes import start
from tests.weights.hub_server import HubServer


def model(path: Path) -> torch.nn.Module:
    return AutoModel.from_pretrained(path)


def assert_merged(path: Path, *adapters_and_scales: tuple[Path, float]) -> None:
    """That a folder holds what comes out in memory."""
    expected, found = model(MINILM), model(path)
    for number, (adapter, scale) in enumerate(adapters_and_scales):
        adapters.load(expected, adapter, name=str(number), scale=scale).merge()
    others = dict(found.named_parameters())
    named = [(name, parameter) for name, parameter in expected.named_parameters() if name in others]
    assert [name for name, parameter in named if not torch.equal(parameter, others[name])] == []


def test_into_a_folder_that_can_be_loaded(style: Path, kohya: Path, tmp_path: Path) -> None:
    said = done("merge", MINILM, tmp_path / "out", "--adapter", f"{style}=0.7", "--adapter", kohya)
    assert said == f"{tmp_path / 'out'}: 90.9 MB, with 2 adapters merged.\n"
    assert_merged(tmp_path / "out", (style, 0.7), (kohya, 1.0))
    left_out = {"README.md", "model.safetensors"}
    before, after = contents(MINILM), contents(tmp_path / "out")
    assert all(after[name] == content for name, content in before.items() if name in after and name not in left_out)
    assert {"config.json", "tokenizer.json", "vocab.txt"} & before.keys() <= after.keys()


def test_as_peft_merges(style: Path, tmp_path: Path) -> None:
    done("merge", MINILM, tmp_path / "out", "--adapter", style)
    theirs = peft.PeftModel.from_pretrained(model(MINILM), style).merge_and_unload()
    tokens = torch.tensor([[101, 7592, 2088, 102]])
    with torch.no_grad():
        ours = model(tmp_path / "out")(tokens).last_hidden_state
        torch.testing.assert_close(ours, theirs(tokens).last_hidden_state)


def test_from_the_hub_in_shards_and_another_type(hub: HubServer, small: Path, tmp_path: Path) -> None:
    serve(hub, "someone/model", small / "model")
    serve(hub, "someone/style", small / "style")
    options = ("--adapter", "someone/style=-1e-1", "--dtype", "bfloat16", "--max-shard-size", "50kB")
    said = document("merge", "someone/model", tmp_path / "out", *options)
    assert said["adapters"] == [{"source": "someone/style", "scale": -0.1}]
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert said["files"] == len(files) > 1
    assert said["bytes"] == sum(file.stat().st_size for file in files)
    assert all(file.stat().st_size < 56e3 for file in files)
    assert {tensor.dtype for tensor in weights.open(tmp_path / "out").infos.values()} <= {torch.bfloat16, torch.int64}
    assert json.loads((tmp_path / "out" / "config.json").read_text()).get("torch_dtype", "bfloat16") == "bfloat16"


def test_one_model_of_a_pipeline(tmp_path: Path) -> None:
    pipe = pipeline().pipe
    pipe.save_pretrained(tmp_path / "pipe")
    patch = adapters.inject(pipe, adapters.LoRA(rank=2), targets=["to_q", "q_proj"], exclude="vae.**", seed=0)
    for parameter in patch.parameters():
        torch.nn.init.normal_(parameter)
    patch.save_pretrained(tmp_path / "both.safetensors", format="lycoris")
    both = ("--adapter", tmp_path / "both.safetensors")
    assert "choose one out of text_encoder, unet" in refused("merge", tmp_path / "pipe" / "unet", tmp_path / "x", *both)
    done("merge", tmp_path / "pipe" / "unet", tmp_path / "unet", *both, "--component", "unet")
    done("merge", tmp_path / "pipe", tmp_path / "merged", *both)
    one, whole = weights.open(tmp_path / "unet"), weights.open_parts(tmp_path / "merged")["unet"]
    assert all(torch.equal(tensor, whole[name]) for name, tensor in one.items())


def test_bad_input_is_one_line(style: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "there is no layer" in refused("merge", style, out, "--adapter", style)
    assert "no such file" in refused("merge", tmp_path / "none", out, "--adapter", style)
    assert "no such file" in refused("merge", MINILM, out, "--adapter", tmp_path / "none=2")
    out.mkdir()
    (out / "mine").write_text("mine")
    assert "is there already" in refused("merge", MINILM, out, "--adapter", style)
    assert contents(tmp_path) == {"out/mine": b"mine"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "Missing option '--adapter'"),
        (("--adapter", "style=much"), "'much' is not a number"),
        (("--adapter", "style", "--max-shard-size", "large"), "'large' is not a size"),
        (("--adapter", "style", "--max-shard-size", "0GB"), "'0GB' is not a size"),
        (("--adapter", "style", "--dtype", "int8"), "int8"),
    ],
)
def test_bad_usage(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    result = fluxion("merge", MINILM, tmp_path / "out", *options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_ctrl_c_leaves_nothing_that_looks_whole_and_the_same_command_goes_on(style: Path, tmp_path: Path) -> None:
    slow = (
        "import time, sys; from weights.tensors import resume; from adapters.cli import main\n"
        "write = resume.Writer.write\n"
        "resume.Writer.write = lambda *args: (time.sleep(0.05), write(*args)); main(sys.argv[1:])"
    )
    out = tmp_path / "out"
    command = ("merge", MINILM, out, "--adapter", f"{style}=0.7")
    running = start(sys.executable, "-c", slow, *command, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / ".out.part" / "files" / "model.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert (running.returncode, said) == (130, "The same command resumes from here.\nAborted!\n")
    assert not out.exists()
    assert (tmp_path / ".out.part").is_dir()
    done(*command)
    assert_merged(out, (style, 0.7))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
