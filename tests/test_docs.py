"""The documentation: every block of every page runs, in order, in Python or as a command; and the site is built."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest

import adapters
import fluxion
import weights
from adapters.methods import METHODS
from tests.adapters.cli.files import done
from tests.weights.conftest import hub, hub_home
from tests.weights.hub_server import WRITER, HubServer

__all__ = ["hub", "hub_home"]

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INSTALLED = re.compile(r"pip (install|uninstall) |make |eval |_FLUXION_COMPLETE=|hf auth ")  # What other tests do.


def run_commands(text: str) -> None:
    """Run the lines of a block for a shell that begin with the command."""
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("fluxion "):
            done(*shlex.split(line, comments=True)[1:])
        else:
            assert not line or line.startswith("#") or INSTALLED.match(line), f"This line is not tried: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_blocks_run(page: Path, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", WRITER)  # on a Hub of this machine
    names: dict[str, object] = {"__name__": page.stem}
    blocks = BLOCK.findall(page.read_text())
    assert blocks
    known = set(METHODS)
    try:
        for language, block in blocks:
            if language == "python":
                exec(compile(block, page.name, "exec", dont_inherit=True), names)
            elif language == "sh":
                run_commands(block)
            else:
                assert language == "text", f"Nobody tries a block in {language or 'no language'}."
    finally:  # What a page registers is forgotten.
        for key in METHODS.keys() - known:
            METHODS.forget(key)


# The site


class Requests(HTMLParser):
    """The addresses that a browser gets when it shows a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag == "link" and attributes.get("rel") not in ("canonical", "prev", "next"):
            self.found.append(str(attributes["href"]))
        elif attributes.get("src"):
            self.found.append(str(attributes["src"]))


def test_nothing_in_the_site_comes_from_another_host(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert {page.stem for page in PAGES} < {page.stem for page in pages}
    for page in pages:
        base = site if page.name == "404.html" else page.parent
        for address in Requests(page).found:
            assert (base / address.removeprefix("/").partition("?")[0]).is_file(), f"{page.name} needs {address}"
    for sheet in site.rglob("*.css"):
        for address in re.findall(r"url\((.*?)\)|@import\s+(\S+)", sheet.read_text()):
            assert "".join(address).strip("\"'").startswith(("data:", "#", "..")), f"{sheet.name} needs {address}"


def test_the_search_finds_functions_and_guides(site: Path) -> None:
    places = {entry["location"] for entry in json.loads((site / "search" / "search_index.json").read_text())["docs"]}
    assert {"api/adapters.html#adapters.patch.inject.inject", "training.html#learning-rates"} <= places


ALIASES = {
    "METHODS",
    "register",
    "Context",
    "Contexts",
    "__version__",
}  # Names of types and tables, which are explained in place.


@pytest.mark.parametrize("package", [adapters, fluxion, weights], ids=lambda package: package.__name__)
def test_the_reference_has_all_that_is_public(site: Path, package: ModuleType) -> None:
    page = (site / "api" / f"{package.__name__}.html").read_text()
    there = {anchor.rpartition(".")[2] for anchor in re.findall(r'id="([\w.]+)"', page)}
    renamed = {"open": "open_tensors"}
    assert {renamed.get(name, name) for name in package.__all__} - there - ALIASES == set()


def test_drawings_are_what_makes_them_says() -> None:
    made = runpy.run_path(str(DOCS / "site" / "draw.py"))
    drawings = {name: made[name]().render() for name in ("tree", "adapter", "patch", "context", "icon")}
    assert {path.stem: path.read_text() for path in (DOCS / "drawings").iterdir()} == drawings
    text = "".join(page.read_text() for page in PAGES)
    assert all(f"(drawings/{name}.svg)" in text for name in drawings.keys() - {"icon"})
