"""What the site has beyond the pages: the measured results, and drawings that follow its colours."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import adapters

_ROOT = Path(__file__).parents[2]
_METHODS = "<!-- one entry for each method, by the hook of the site -->"
_OWN_STYLE = re.compile(r"<style>.*?</style>", re.DOTALL)  # For a drawing by itself; the site has its own.


def on_files(files: Files, config: Any) -> Files:
    """Add the results of the benchmarks, and the style sheet, which are elsewhere."""
    for path in (*sorted((_ROOT / "benchmarks").glob("*.svg")), _ROOT / "benchmarks" / "RESULTS.md"):
        files.append(File.generated(config, f"benchmarks/{path.name}", abs_src_path=str(path)))
    files.append(File.generated(config, "style.css", abs_src_path=str(Path(__file__).with_name("style.css"))))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links to the results lead to where they are in the site, and give the widest table the whole width."""
    if page.file.src_uri == "methods.md":
        page.meta["hide"] = ["toc"]
    return markdown.replace("](../benchmarks/", "](benchmarks/").replace(_METHODS, _methods())


def _methods() -> str:
    """The entries of the reference for all methods, in alphabetical order."""
    found = sorted(adapters.METHODS.values(), key=lambda method: method.__name__.lower())
    return "\n\n".join(f"::: {method.__module__}.{method.__name__}" for method in found)


def on_page_content(html: str, **_: Any) -> str:
    """Put drawings into the page itself, so that their lines have the colour of its text, by day and by night."""
    return re.sub(r'<img[^>]*src="drawings/(\w+\.svg)"[^>]*>', lambda found: _drawing(found[1]), html)


def _drawing(name: str) -> str:
    svg = (_ROOT / "docs" / "drawings" / name).read_text(encoding="utf-8")
    return f'<div class="drawing-frame">{_OWN_STYLE.sub("", svg)}</div>'
