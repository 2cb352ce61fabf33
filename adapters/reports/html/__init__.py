"""Reports as HTML: pages and fragments for notebooks, made from the templates in this package.

Everything from a file is cleaned of characters that are not printable and escaped. The Content-Security-Policy of a
page lets it load nothing, and run no script but those in it.
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
from adapters.reports.html import shown
from adapters.reports.html.charts import charts_of
from adapters.reports.html.view import View, of_report

MARK = '<meta name="generator" content="fluxion report">'
"""A tag in the head of every page that was made here."""


def is_page(path: Path) -> bool:
    """Whether a file is a page that was made here, judged by its beginning."""
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
            of_report(report),
            mark=Markup(MARK),
            style=Markup(_text("tree.css") + _text("page.css")),
            scripts=[Markup(script) for script in scripts],
            allowed=" ".join(map(_hash, scripts)),
            data=Markup(_embedded(charts_of(report))),
            version=fluxion.__version__,
        )
    )


def fragment(report: Facts) -> str:
    """A report for a notebook: the facts and the tree, without charts."""
    return _fragment("report.html", of_report(report))


def _fragment(template: str, values: View) -> str:
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
    environment.filters |= {"number": shown.number, "share": shown.share, "cosine": shown.cosine}
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
    """JSON for a script element, in which nothing can end the element or begin a comment."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
