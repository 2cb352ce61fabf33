"""What is shipped: a wheel and an sdist that install into a fresh environment, with their data, and work there."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
from pathlib import Path

import pytest

import fluxion

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    # The wheel is built from the sdist, so the sdist is complete.
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT], check=True)
    return out


def test_wheel_works_in_a_fresh_environment(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True)
    # The dependencies are the ones of this environment, which is searched last.
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))

    def run(*command: str | Path) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout

    assert fluxion.__version__ in run(tmp_path / "env" / "bin" / "fluxion", "--version")
    program = (
        "import adapters, fluxion, weights\n"
        "from adapters.cli.demo.data import load_digits\n"
        "from adapters.cli.demo.model import load_model\n"
        "from importlib.resources import files\n"
        "load_digits(), load_model()\n"
        "for package in (adapters, fluxion, weights):\n"
        "    assert (files(package) / 'py.typed').is_file(), package\n"
        "    print(package.__file__)\n"
    )
    locations = run(python, "-c", program).split()
    assert [Path(location).is_relative_to(site) for location in locations] == [True] * 3


def test_sdist_holds_the_project(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "SECURITY.md", "LICENSE", "Makefile", "constraints.txt"} <= names
    assert {"fluxion/chain.py", "adapters/patch.py", "weights/files.py", "tests/test_packaging.py"} <= names


def test_everything_the_project_installs_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(need for extra in extras for need in extra)]

    def names(requirements: list[str]) -> set[str]:
        return {re.split("[=><]", need)[0].replace("_", "-").lower() for need in requirements}

    assert names(wanted) - names((ROOT / "constraints.txt").read_text().split()) == set()
