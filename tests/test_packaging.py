"""What is shipped: a wheel and an sdist that install into a fresh environment, with their data, and work there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import fluxion

ROOT = Path(__file__).parents[1]
# A fresh environment imports what is installed in it, wherever these tests are told to import from.
SURROUNDINGS = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    # The wheel is built from the sdist, so the sdist is complete.
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT], check=True)
    return out


def fresh_environment(folder: Path) -> tuple[Path, Path]:
    """Its Python and where its packages are. The dependencies are those of this environment, which is searched last."""
    venv.create(folder)
    site = next((folder / "lib").glob("python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin" / "python", site


def pip(python: Path, *arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "--quiet", *arguments], check=True)


def install(python: Path, wheel: Path, *options: str) -> None:
    pip(python, "install", "--no-deps", "--no-index", *options, wheel)


def test_wheel_works_in_a_fresh_environment(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    python, site = fresh_environment(tmp_path / "env")
    install(python, wheel)

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, env=SURROUNDINGS)
        return done.stdout

    assert fluxion.__version__ in run(tmp_path / "env" / "bin" / "fluxion", "--version")
    program = (
        "import adapters, fluxion, weights\n"
        "from adapters.cli.demo.data import load_digits\n"
        "from adapters.cli.demo.model import load_model\n"
        "from importlib.resources import files\n"
        "load_digits(), load_model()\n"
        "assert '<!doctype html>' in adapters.report(weights.AdapterFile({})).to_html()\n"
        "for package in (adapters, fluxion, weights):\n"
        "    assert (files(package) / 'py.typed').is_file(), package\n"
        "    print(package.__file__)\n"
    )
    locations = run(python, "-c", program).split()
    assert [Path(location).is_relative_to(site) for location in locations] == [True] * 3


def namesake(folder: Path) -> Path:
    """A wheel as AdapterHub's distribution, as far as it is in the way of this one: the same name, other files."""
    files = {
        "adapters/__init__.py": "import not_installed\n",
        "adapters/models/__init__.py": "",  # in the way of models.py
        "adapters-1.3.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: adapters\nVersion: 1.3.0\n",
        "adapters-1.3.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files["adapters-1.3.0.dist-info/RECORD"] = "".join(f"{name},,\n" for name in files)
    path = folder / "adapters-1.3.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


@pytest.mark.exhaustive
def test_a_distribution_with_the_same_import_name_is_explained(built: Path, tmp_path: Path) -> None:
    (ours,), theirs = built.glob("*.whl"), namesake(tmp_path)
    python, _ = fresh_environment(tmp_path / "env")

    def fluxion_says(*arguments: str) -> tuple[int, str]:
        command = [python.with_name("fluxion"), *arguments]
        environment = {**SURROUNDINGS, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout + done.stderr

    clash = "Another distribution, adapters 1.3.0, has the import name `adapters` too"
    way_out = "pip uninstall -y adapters && pip install --force-reinstall --no-deps fluxion-adapters"

    install(python, ours)
    install(python, theirs)  # Theirs is in the place of ours, and cannot be imported.
    for arguments in (("doctor",), ("merge", "base.safetensors", "new", "--adapter", "style")):
        code, said = fluxion_says(*arguments)
        assert code == 1 and clash in said and "1 of them in the place of ours" in said and way_out in said

    install(python, ours, "--force-reinstall")  # Ours is back, and theirs in the way of one of its modules.
    code, said = fluxion_says("doctor")
    assert code == 1 and clash in said and way_out in said and "in the place of ours" not in said

    pip(python, "uninstall", "-y", "adapters")  # some of ours with it
    code, said = fluxion_says("doctor")
    assert (
        code == 1 and "1 of the files of fluxion-adapters are missing or changed, such as adapters/__init__.py" in said
    )
    install(python, ours, "--force-reinstall")
    assert fluxion_says("doctor")[0] == 0


def test_sdist_holds_the_project(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "SECURITY.md", "LICENSE", "Makefile", "constraints.txt"} <= names
    assert {
        "fluxion/chain.py",
        "adapters/patch/patch.py",
        "weights/tensors/open.py",
        "tests/test_packaging.py",
    } <= names


def test_everything_the_project_installs_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(need for extra in extras for need in extra)]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[=><\[]", need)[0].replace("_", "-").lower() for need in requirements}

    pinned = names((ROOT / "constraints.txt").read_text().split())
    assert names(wanted) - pinned == {project["name"]}  # Its extras name each other.
