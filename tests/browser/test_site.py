"""The site of the documentation in a real browser: no other host is asked, nothing goes wrong, search finds."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from tests.thinned import exhaustive

PAGES = ["index", "diffusion", "methods", "api/adapters", "benchmarks/RESULTS"]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where the site is served."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(params=[(390, "light"), exhaustive((1280, "dark"))], ids=str)
def page(request: pytest.FixtureRequest, browser: Browser, address: str) -> Iterator[Page]:
    """A window of some width, in which nothing may go wrong."""
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, wrong = context.new_page(), []
    page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("response", lambda answer: wrong.append(f"{answer.url}: {answer.status}") if answer.status >= 400 else None)
    page.on(
        "request",
        lambda asked: wrong.append(asked.url) if not asked.url.startswith((address, "data:", "blob:")) else None,
    )
    try:
        yield page
        assert not wrong, wrong
    finally:
        context.close()


def test_pages_fit_and_follow_the_colours_of_the_system(page: Page, address: str) -> None:
    narrow = page.viewport_size and page.viewport_size["width"] < 600
    for name in PAGES if narrow else PAGES[:1]:
        page.goto(f"{address}/{name}.html")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
    page.goto(f"{address}/concepts.html", wait_until="networkidle")
    ground, line = page.evaluate(
        """[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector(".drawing")).color]
            .map(colour => colour.match(/[\\d.]+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0))"""
    )
    assert (
        (ground < 200 < line) if page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") else line < ground
    )


def test_the_search_finds(page: Page, address: str) -> None:
    page.goto(f"{address}/index.html", wait_until="networkidle")
    if page.viewport_size and page.viewport_size["width"] < 600:
        page.click("label.md-header__button[for=__search]")
    page.locator(".md-search__input").press_sequentially("merge_files")
    page.locator(".md-search-result__link[href*='adapters.files.merge.merge_files']").first.click()
    page.wait_for_url("**/api/adapters.html*")
    assert page.locator("[id='adapters.files.merge.merge_files']").is_visible()
