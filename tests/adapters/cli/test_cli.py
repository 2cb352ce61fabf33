from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import adapters
import fluxion as fl
import weights
from adapters.cli import Commands, main
from fluxion.errors import ChainError
from tests.adapters.cli.files import refused
from tests.processes import installed
from tests.weights.hub_server import HubServer


def test_the_installed_command_says_its_version() -> None:
    said, _ = installed("--version").communicate()
    assert said.decode() == f"fluxion, version {version('fluxion-adapters')}\n"
    assert fl.__version__ == version("fluxion-adapters")


def test_help_names_every_command() -> None:
    shown = CliRunner().invoke(main, ["--help"]).stdout
    assert all(f"  {name} " in shown for name in main.commands)


@pytest.mark.parametrize("name", main.commands)
def test_every_command_explains_itself(name: str) -> None:
    done = CliRunner().invoke(main, [name, "--help"])
    assert done.exit_code == 0
    assert done.stdout.startswith(f"Usage: main {name}")


def test_an_unknown_command_is_a_usage_error() -> None:
    done = CliRunner().invoke(main, ["dmeo"])
    assert done.exit_code == 2
    assert "No such command 'dmeo'" in done.stderr


def failing(error: BaseException) -> click.Group:
    def fail() -> None:
        raise error

    return Commands(commands=[click.Command("fail", callback=fail)])


@pytest.mark.parametrize(
    "error",
    [
        adapters.TargetError("No layer\nlike that."),
        weights.FileFormatError("No layer like that."),
        ChainError("No layer like that."),
        OSError("No layer like that."),
        click.ClickException("No layer like that."),
    ],
)
def test_an_expected_error_is_one_line(error: Exception) -> None:
    done = CliRunner().invoke(failing(error), ["fail"])
    assert (done.exit_code, done.stdout, done.stderr) == (1, "", "Error: No layer like that.\n")


def test_a_fault_of_the_program_is_not_hidden_and_has_a_code_of_its_own() -> None:
    done = CliRunner().invoke(failing(ZeroDivisionError("a fault")), ["fail"])
    assert (done.exit_code, done.stdout) == (70, "")
    assert "Traceback" in done.stderr and "ZeroDivisionError: a fault" in done.stderr


def test_ctrl_c_ends_with_the_code_of_the_shell() -> None:
    done = CliRunner().invoke(failing(KeyboardInterrupt()), ["fail"])
    assert (done.exit_code, done.stderr) == (130, "Aborted!\n")


def test_an_error_says_nothing_that_a_terminal_would_obey() -> None:
    done = CliRunner().invoke(failing(weights.HubError("No \x1b[31mlayer\x07.")), ["fail"])
    assert done.stderr == "Error: No  [31mlayer .\n"


def test_a_path_with_a_line_break_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a\nb").touch()
    said = refused("convert", "nothing", tmp_path / "a\nb")
    assert said == f"Error: {tmp_path}/a b is there already: choose another destination, or remove it first.\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("tree", ""),
        ("inspect", ""),
        ("convert", "", "out"),
        ("merge", "", "out", "--adapter", "style"),
        ("merge", "model", "out", "--adapter", ""),
        ("diff", "style", ""),
        ("pull", ""),
        ("push", "", "me/style"),
    ],
)
def test_an_empty_source_is_not_the_current_folder(arguments: tuple[str, ...]) -> None:
    done = CliRunner().invoke(main, [*arguments])
    assert done.exit_code == 2 and done.stderr.endswith("It is empty: give a path, or a place on the Hub.\n")


def test_a_reader_who_has_enough_hears_nothing(style: Path) -> None:
    running = installed("tree", style, "--json")
    assert running.stdout is not None and running.stderr is not None
    running.stdout.close()
    assert (running.stderr.read(), running.wait()) == (b"", 141)


def test_letters_without_a_code_are_replaced(style: Path, tmp_path: Path) -> None:
    out, error = installed("convert", style, tmp_path / "…", PYTHONIOENCODING="latin-1").communicate()
    assert (out.partition(b": ")[0], error) == (f"{tmp_path}/?".encode(), b"")


def test_the_name_of_a_file_keeps_its_bytes(hub: HubServer, tmp_path: Path) -> None:
    hub.add("someone/texts", {"config.json": b"{}"})
    odd = os.fsencode(tmp_path) + b"/\xff"
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "PYTHONIOENCODING": "utf-8:strict"}
    out, _ = installed("pull", "someone/texts", os.fsdecode(odd), **settings).communicate()
    assert out == odd + b"\n"
