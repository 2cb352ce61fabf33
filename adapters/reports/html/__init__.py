"""Pages and fragments of HTML that show reports and patches, made from the templates in this package.

Everything that a file says is cleaned of letters that are not printable and escaped, and a page may ask for nothing
from anywhere: it says so in its Content-Security-Policy, which lets no script run but those that are in it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import cast

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import fluxion
from adapters.errors import AdapterError
from adapters.reports.facts import Facts
from adapters.reports.html import view

MARK = '<meta name="generator" content="fluxion report">'
"""What a page that was made here has in its head."""


def is_page(path: Path) -> bool:
    """Whether a file is a page that was made here, by what it begins with."""
    with path.open("rb") as file:
        return MARK.encode() in file.read(1024)


def check_charts() -> None:
    """Raise an AdapterError if the library that draws the charts is not installed."""
    _plotly()


def page(report: Facts) -> str:
    """A report as one page with everything in it.

    Raises:
        AdapterError: The library that draws the charts is not installed.
    """
    scripts = [_plotly(), _text("page.js")]
    return (
        _environment()
        .get_template("page.html")
        .render(
            view.of_report(report),
            mark=Markup(MARK),
            style=Markup(_text("tree.css") + _text("page.css")),
            scripts=[Markup(script) for script in scripts],
            allowed=" ".join(map(_hash, scripts)),
            data=Markup(_embedded(view.charts_of(report))),
            version=fluxion.__version__,
        )
    )


def fragment(report: Facts) -> str:
    """What a notebook shows of a report: the facts and the tree, without charts."""
    return _fragment("report.html", view.of_report(report))


def _fragment(template: str, values: view.View) -> str:
    return _environment().get_template(template).render(values, style=Markup(_text("tree.css")))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("adapters.reports", "html"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"number": view.number, "share": view.share, "cosine": view.cosine}
    return environment


def _text(name: str) -> str:
    return (files("adapters.reports.html") / name).read_text("utf-8")


@cache
def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise AdapterError(
            "The charts of a report need plotly, which is not installed: pip install 'fluxion-adapters[report]'."
        ) from error
    return cast(str, get_plotlyjs())


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _embedded(data: object) -> str:
    """JSON that nothing in it can end, or turn into a comment, inside of a script element."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
