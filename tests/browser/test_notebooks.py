"""Chains, patches and reports in a notebook that is run, and then opened in a real browser."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbconvert import HTMLExporter
from nbconvert.preprocessors import ExecutePreprocessor
from playwright.sync_api import Browser, expect

from tests.browser.opened import WIDTHS, assert_readable, opened

CELLS = [
    """
import torch, adapters, fluxion as fl
torch.manual_seed(0)
model = fl.Chain(fl.Chain(fl.Linear(8, 16), fl.ReLU()), fl.Linear(16, 4))
style = adapters.inject(model, adapters.LoRA(rank=2), name="<b>style")
for parameter in style.parameters():
    parameter.data.normal_()
model
""",
    "style",
    "adapters.report(style)",
]


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a notebook with these cells, in which everything was run."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in CELLS])
    ExecutePreprocessor(timeout=120, kernel_name="python3").preprocess(book, {"metadata": {"path": Path.cwd()}})
    # The template without scripts and styles of others, which would be fetched.
    page, _ = HTMLExporter(template_name="basic").from_notebook_node(book)
    path = tmp_path_factory.mktemp("notebook") / "notebook.html"
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += (
        '<meta name="color-scheme" content="light dark"><style>body {background: Canvas} pre {overflow-x: auto}</style>'
    )
    path.write_text(
        f"<!doctype html><html><head>{head}<title>Notebook</title></head><body>{page}</body></html>", "utf-8"
    )
    return path


@pytest.mark.parametrize(("width", "scheme"), zip(WIDTHS, ("dark", "light"), strict=True))
def test_they_are_shown(browser: Browser, notebook: Path, width: int, scheme: str, tmp_path: Path) -> None:
    with opened(browser, notebook, width, scheme) as page:
        chain, patch, report = page.locator(".output_html").all()
        expect(chain.locator("summary").first).to_contain_text("(CHAIN)")
        expect(patch.locator("summary")).to_have_text("Patch '<b>style': injected, scale 1")
        patch.locator("summary").click()
        expect(patch.locator("pre")).to_contain_text("LoRA(rank=2")
        expect(patch.locator("pre")).to_contain_text("2 layers, 88 parameters")
        expect(report.locator("table")).to_contain_text("88")
        leaf = report.locator(".leaf .size").last
        expect(leaf).to_be_visible()
        assert page.screenshot(path=tmp_path / f"notebook-{width}.png", full_page=True)
        group = chain.locator("details").first
        group.locator("summary").first.click()
        assert group.get_attribute("open") is None
        assert_readable(page)
