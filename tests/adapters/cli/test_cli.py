from __future__ import annotations

import subprocess
import sys
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


def test_the_installed_command_says_its_version() -> None:
    command = Path(sys.executable).with_name("fluxion")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"fluxion, version {version('fluxion-adapters')}\n"
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


def test_a_fault_of_the_program_is_not_hidden() -> None:
    assert isinstance(CliRunner().invoke(failing(ZeroDivisionError()), ["fail"]).exception, ZeroDivisionError)


def test_ctrl_c_ends_with_the_code_of_the_shell() -> None:
    done = CliRunner().invoke(failing(KeyboardInterrupt()), ["fail"])
    assert (done.exit_code, done.stderr) == (130, "Aborted!\n")
