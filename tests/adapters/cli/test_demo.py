from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

import adapters
from adapters.cli import main
from adapters.cli.console import make_console
from adapters.cli.demo import show, steps, story
from adapters.cli.demo.data import DOMAINS, load_digits
from adapters.cli.demo.destination import Folder
from adapters.cli.demo.model import DigitClassifier, load_model
from adapters.cli.demo.proof import Snapshot
from tests.processes import COMMAND, start
from tests.weights.hub_server import WRITER, HubServer

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def demo(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["demo", *map(str, arguments)])


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little training, that is enough still for what the demo promises."""
    monkeypatch.setattr(steps, "TRAINING_STEPS", 50)


# The real command, once


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def output(home: Path) -> str:
    """What the command prints into a pipe, without network and account."""
    settings = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home / ".hf"), "COLUMNS": "80"}
    running = start(COMMAND, "demo", settings=settings, cwd=home, encoding="utf-8")
    said, wrong = running.communicate(timeout=120)
    assert (running.returncode, wrong) == (0, "")
    return said


def percents(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"([\d.]+) %", line)]


@pytest.fixture
def table(output: str) -> dict[str, dict[str, float]]:
    rows = [line.split()[0:1] + percents(line) for line in output.split("Toggled")[1].splitlines()[4:8]]
    return {str(name): dict(zip(DOMAINS, map(float, values), strict=True)) for name, *values in rows}


def test_a_pipe_gets_plain_short_text(output: str) -> None:
    assert all(char.isprintable() or char == "\n" for char in output)
    assert not any(line.endswith(" ") for line in output.splitlines())
    assert len(output.splitlines()) < 80


def test_the_tree_is_shown_whole(output: str) -> None:
    assert all(f"   {line}\n" in output for line in repr(load_model()).splitlines())
    assert "(LORA) rotated(rank=4, alpha=8) #1" in output


def test_each_patch_gains_what_is_promised(table: dict[str, dict[str, float]], output: str) -> None:
    assert list(table) == ["base", "rotated", "mirrored", "both"]
    for name in ("rotated", "mirrored"):
        assert table[name][name] - table["base"][name] >= 30
    assert table["base"]["upright"] > 95
    assert "6,220 parameters, 7.31 % of the base's" in output


def test_one_call_with_a_patch_for_each_row(table: dict[str, dict[str, float]], output: str) -> None:
    (line,) = (line for line in output.splitlines() if "One call" in line)
    mixed, alone = percents(line)
    alike = (table["base"]["upright"] + table["rotated"]["rotated"] + table["mirrored"]["mirrored"]) / 3
    assert mixed == pytest.approx(alike, abs=3)  # The same digits, each in one domain instead of in all.
    assert alone == pytest.approx(sum(table["base"].values()) / 3, abs=3)


def test_everything_claimed_was_checked(output: str) -> None:
    assert (output.count("✓"), output.count("✗")) == (6, 0)
    assert output.splitlines()[-1].startswith("Done in ")


def test_the_folder_is_a_hub_repository(output: str, home: Path) -> None:
    folder = home / "fluxion-demo"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert all(name in output.split("Published")[1] for name in FILES)
    assert sorted(path.name for path in home.iterdir()) == ["fluxion-demo"]
    assert (folder / "README.md").read_text().startswith("---\nlibrary_name: fluxion-adapters\n")


def test_what_was_saved_works_in_a_fresh_model(output: str, home: Path, table: dict[str, dict[str, float]]) -> None:
    model, digits = load_model(), load_digits()
    patch = adapters.load(model, home / "fluxion-demo")
    assert patch.num_parameters() == 6220
    right = steps.accuracy(model, DOMAINS["rotated"](digits.test_images), digits.test_labels)
    assert 100 * right == pytest.approx(table["rotated"]["rotated"], abs=0.06)


@pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")
def test_ctrl_c_while_training_leaves_nothing(tmp_path: Path) -> None:
    with start(COMMAND, "demo", cwd=tmp_path, text=True) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if "targets=" in line)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20)[1] == "Aborted!\n"
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


# Where it publishes to


@pytest.mark.usefixtures("short")
def test_an_earlier_demo_is_replaced_and_its_card_kept(tmp_path: Path) -> None:
    folder = tmp_path / "some" / "[/where] :smile:"
    first = demo("--output", folder)
    assert (first.exit_code, first.stderr) == (0, "")
    before = tree(folder)
    (folder / "README.md").write_text("mine")
    (folder / ".hidden").write_text("mine")
    assert demo("--output", folder).exit_code == 0
    after = tree(folder)
    assert after.pop(str(folder / ".hidden")) == after[str(folder / "README.md")] == b"mine"
    assert {**after, str(folder / "README.md"): before[str(folder / "README.md")]} == before


@pytest.mark.usefixtures("short")
def test_the_hub_instead_of_a_folder(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.chdir(tmp_path)
    done = demo("--repo", "me/digits", "--private")
    assert (done.exit_code, done.stderr) == (0, "")
    sha, files = hub.repos["me/digits"].commits[-1]
    assert sorted(files) == [".gitattributes", *FILES]
    assert hub.repos["me/digits"].private
    assert f"{hub.url}/me/digits/commit/{sha}" in done.stdout
    assert not (tmp_path / "fluxion-demo").exists()


@pytest.mark.usefixtures("short")
def test_a_token_that_may_not_write(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    done = demo("--repo", "me/digits")
    assert done.exit_code == 1
    assert re.fullmatch(r"Error: me/digits: the token may not do this; .*\n", done.stderr)
    assert hub.repos == {}


# Bad input: told before any work is done


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub_home: Path) -> Iterator[Path]:
    """A current folder with all sorts of things in it, which stay as they are; the demo must not begin."""
    place = tmp_path / "place"
    for name in ("file", "notes/notes.txt", "other/adapter_config.json", "other/adapter_model.safetensors"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("mine")
    model = nn.Sequential(nn.Linear(2, 2))
    adapters.inject(model, adapters.LoRA(), "0").save_pretrained(place / "foreign")
    (place / "closed").mkdir(mode=0o555)
    monkeypatch.chdir(place)
    monkeypatch.setattr(story, "tell", lambda _: pytest.fail("The demo has begun."))
    before = tree(place)
    yield place
    assert tree(place) == before


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "file"], "place/file is a file, not a folder"),
        (["--output", "file/below"], "place/file is a file, not a folder"),
        (["--output", "notes"], r"notes holds other files, such as notes\.txt"),
        (["--output", "other"], "other does not hold an adapter of this demo"),
        (["--output", "foreign"], "foreign does not hold an adapter of this demo"),
        (["--output", "x" * 300], "cannot be written: File name too long"),
        pytest.param(
            ["--output", "/proc/demo"],
            "/proc/demo cannot be written",
            marks=pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no such folder"),
        ),
        pytest.param(
            ["--output", "closed/demo"],
            "closed/demo cannot be written: Permission denied",
            marks=pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere"),
        ),
        (["--repo", "me/digits"], "Publishing to me/digits needs a token: run `hf auth login` or set HF_TOKEN"),
        (["--repo", "digits"], "'digits' is not a repository id: write --repo user/name"),
        (["--repo", "me/my digits"], "'me/my digits' is not a repository id"),
        (["--repo", "me/my/digits"], "'me/my/digits' is not a repository id"),
    ],
)
def test_bad_input_is_told_in_one_line_before_the_work(arguments: list[str], message: str) -> None:
    done = demo(*arguments)
    assert (done.exit_code, done.stdout) == (1, "")
    assert re.fullmatch(rf"Error: .*{message}.*\.\n", done.stderr)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("arguments", [["--repo", "me/x", "--output", "x"], ["--private"], ["--what"]])
def test_bad_usage(arguments: list[str]) -> None:
    assert demo(*arguments).exit_code == 2


# What it claims, it checks


def test_a_demo_that_gains_too_little_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(steps, "TRAINING_STEPS", 1)
    done = demo("--output", tmp_path / "out")
    assert done.exit_code == 1
    assert re.fullmatch(r"Error: rotated .* this is less than the demo promises\.\n", done.stderr)


def test_an_eject_that_leaves_a_trace_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(steps, "TRAINING_STEPS", 1)
    monkeypatch.setattr(adapters.Patch, "eject", lambda patch: None)
    done = demo("--output", tmp_path / "out")
    assert done.exit_code == 1
    assert "✗ the same module objects" in done.stdout
    assert re.fullmatch(r"Error: This should be true and is not: the same module objects.*\n", done.stderr)
    assert not (tmp_path / "out").exists()


def test_a_file_that_gives_other_outputs_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(steps, "TRAINING_STEPS", 1)
    monkeypatch.setattr(adapters, "load", lambda model, source, name: steps.inject(model, name))
    done = demo("--output", tmp_path / "out")
    assert done.exit_code == 1
    assert "✗ a fresh model has the same outputs" in done.stdout


def replace_module(model: DigitClassifier) -> None:
    model.Head._modules["ReLU"] = nn.ReLU()


def replace_parameter(model: DigitClassifier) -> None:
    model.Head.Linear_2.weight = nn.Parameter(model.Head.Linear_2.weight.detach())


def freeze(model: DigitClassifier) -> None:
    model.Head.Linear_2.bias.requires_grad_(False)


def add_a_key(model: DigitClassifier) -> None:
    model.Head.Linear_2.register_buffer("extra", torch.zeros(1))


def flip_the_sign_of_a_zero(model: DigitClassifier) -> None:
    model.Head.Linear_2.weight.data[0, 0].neg_()


def change_outputs(model: DigitClassifier) -> None:
    model.Head.Linear_2.register_forward_hook(lambda *_: _[2] + 1)


@pytest.mark.parametrize(
    ("change", "false"),
    [
        (lambda model: None, []),
        (replace_module, ["module objects"]),
        (replace_parameter, ["Parameter objects"]),
        (freeze, ["Parameter objects"]),
        (add_a_key, ["keys", "bytes"]),
        (flip_the_sign_of_a_zero, ["bytes"]),
        (change_outputs, ["outputs"]),
    ],
)
def test_the_proof_sees_every_kind_of_change(change: Callable[[DigitClassifier], None], false: list[str]) -> None:
    model, images = load_model(), load_digits().test_images[:8]
    model.Head.Linear_2.weight.data[0, 0] = 0
    before = Snapshot.of(model, images)
    change(model)
    said = [statement for statement, true in before.compare(Snapshot.of(model, images)).items() if not true]
    assert len(said) == len(false)
    assert all(word in statement for word, statement in zip(false, said, strict=True))


# The steps


@pytest.mark.usefixtures("short")
def test_training_one_patch_leaves_the_other_and_the_base_alone() -> None:
    model, digits = load_model(), load_digits()
    first, second = (steps.inject(model, name) for name in steps.SHIFTED)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    threads = torch.get_num_threads()
    with steps.one_thread():
        losses = list(steps.train(model, second, digits))
    assert torch.get_num_threads() == threads
    assert losses[-1] < losses[0]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "lora_mirrored" in name}
    assert all(parameter.grad is None for parameter in first.parameters())


def test_a_mixed_batch_gives_each_row_what_its_patch_alone_gives() -> None:
    model, digits = load_model(), load_digits()
    for name in steps.SHIFTED:
        patch = steps.inject(model, name)
        patch.load_state_dict({key: torch.randn_like(value) / 4 for key, value in patch.state_dict().items()})
    batch = steps.MixedBatch.of(digits)
    assert batch.rows[:4] == [None, "rotated", "mirrored", None]
    with torch.no_grad():
        with adapters.use(model, rows=batch.rows):
            mixed = model(batch.images)
        for row, choice in enumerate(batch.rows[:9]):
            with adapters.use(model, *([choice] if choice else [])):
                image = DOMAINS[choice or "upright"](digits.test_images[row])
                torch.testing.assert_close(mixed[row], model(image[None])[0], rtol=1e-4, atol=1e-4)


def test_a_narrow_terminal_cuts_trees_but_no_addresses(capsys: pytest.CaptureFixture[str]) -> None:
    console = make_console()
    console.width = 40
    show.tree(console, repr(load_model()))
    address = "https://huggingface.co/me/digits/commit/" + 40 * "0"
    show.lines(console, address)
    *cut, whole = capsys.readouterr().out.splitlines()
    assert max(map(len, cut)) == 40
    assert whole.strip() == address


def test_a_folder_without_anything_in_it_will_do(tmp_path: Path) -> None:
    Folder(tmp_path).check()
    Folder(tmp_path / "new" / "er").check()
    assert list(tmp_path.iterdir()) == []
