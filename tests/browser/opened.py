"""Pages opened in a real browser, which may ask for nothing but the page itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, Route

WIDTHS = (390, 1280)


@contextmanager
def opened(browser: Browser, path: Path, width: int = 1280, scheme: Any = "light") -> Iterator[Page]:
    """A page of a file, of which nothing may go wrong while it is open."""
    wrong: list[str] = []

    def allow(route: Route) -> None:
        if route.request.url in (path.as_uri(), "data:,"):
            route.continue_()
        else:
            wrong.append(f"asked for {route.request.url}")
            route.abort()

    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    try:
        context.route("**/*", allow)
        page = context.new_page()
        page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
        page.goto(path.as_uri())
        yield page
        assert not wrong, wrong
    finally:
        context.close()


def assert_readable(page: Page) -> None:
    """Nothing sticks out at the side, and letters stand out from what is behind them (WCAG's 4.5)."""
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    faint = page.evaluate(CONTRAST)
    assert not faint, faint


# Texts whose colour is too near to that of their background.
CONTRAST = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const over = (colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = new Set();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || element.closest("script, style, svg, option, .js-plotly-plot")) continue;
    if (!element.checkVisibility()) continue;
    const grounds = [];
    for (let at = element; at; at = at.parentElement) grounds.unshift(getComputedStyle(at).backgroundColor);
    grounds.unshift("Canvas");
    const [a, b] = [over(grounds), over([...grounds, getComputedStyle(element).color])].map(light);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.add(`${element.className} ${walker.currentNode.data.trim()}: ${ratio.toFixed(2)}`);
  }
  return [...found];
}"""
