"""Hooks of the site: the benchmark results, and drawings in the colours of the page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import adapters

_ROOT = Path(__file__).parents[2]
_METHODS = "<!-- one entry for each method, by the hook of the site -->"
_OWN_STYLE = re.compile(r"<style>.*?</style>", re.DOTALL)  # Of a standalone drawing; the site has its own.


def on_files(files: Files, config: Any) -> Files:
    """Add the results of the benchmarks, and the style sheet, which lie in other folders."""
    for path in (*sorted((_ROOT / "benchmarks").glob("*.svg")), _ROOT / "benchmarks" / "RESULTS.md"):
        files.append(File.generated(config, f"benchmarks/{path.name}", abs_src_path=str(path)))
    files.append(File.generated(config, "style.css", abs_src_path=str(Path(__file__).with_name("style.css"))))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite links to the results, insert the methods, and give the widest table the whole width."""
    if page.file.src_uri == "methods.md":
        page.meta["hide"] = ["toc"]
    return markdown.replace("](../benchmarks/", "](benchmarks/").replace(_METHODS, _methods())


def _methods() -> str:
    """Reference entries of all methods, in alphabetical order."""
    found = sorted(adapters.METHODS.values(), key=lambda method: method.__name__.lower())
    return "\n\n".join(f"::: {method.__module__}.{method.__name__}" for method in found)


def on_page_content(html: str, **_: Any) -> str:
    """Inline the drawings, so that their lines have the text colour of the page, in light and dark mode."""
    return re.sub(r'<img[^>]*src="drawings/(\w+\.svg)"[^>]*>', lambda found: _drawing(found[1]), html)


def _drawing(name: str) -> str:
    svg = (_ROOT / "docs" / "drawings" / name).read_text(encoding="utf-8")
    return f'<div class="drawing-frame">{_OWN_STYLE.sub("", svg)}</div>'
