"""The picture of a tree in a notebook."""

import re
from html.parser import HTMLParser

import torch
from torch import nn

import fluxion as fl
from fluxion.printing import notebook


class Reader(HTMLParser):
    """Checks that every tag is closed in order, and lists the lines of the tree with their CSS class."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.lines: list[tuple[str, str | None]] = []
        self.classes: list[str | None] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.classes.append(dict(attrs).get("class"))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.classes.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "summary":
            self.lines.append((data, self.classes[-2]))
        elif self.open and self.open[-1] == "div":
            self.lines.append((data, self.classes[-1]))


def text_of(html: str) -> str:
    return re.sub(r"<[^>]*>", " ", html.split("</style>")[1])


def test_a_collapsible_tree_with_counts_and_dtypes() -> None:
    model = fl.Chain(fl.Linear(2, 3), fl.Residual(nn.Sequential(nn.Linear(3, 3, dtype=torch.float16), nn.ReLU())))
    html = model._repr_html_()
    lines = [line for line, _ in Reader(html).lines]
    assert lines == [
        "(CHAIN)",
        "Linear(in_features=2, out_features=3, device=cpu, dtype=float32)",
        "(RES) Residual()",
        "Sequential()",
        "Linear(in_features=3, out_features=3, bias=True)",
        "ReLU()",
    ]
    assert html.count("<details") == html.count("<summary>") == 3
    assert html.count("<details open>") == 2
    assert "<summary>(CHAIN)<i>21 float16, float32</i></summary>" in html
    assert "dtype=float32)<i>9 float32</i></div>" in html
    assert "<div>ReLU()</div>" in html


def test_text_is_escaped() -> None:
    class Sneaky(fl.Module):
        def __str__(self) -> str:
            return "<script>alert('&')</script>"

    html = fl.Chain(Sneaky())._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;" in html


def test_adapters_stand_out() -> None:
    class Adapting(fl.Chain):
        _highlight = True

    found = Reader(fl.Chain(fl.Linear(1, 1), Adapting(fl.Linear(1, 1)), fl.ReLU(), Adapting())._repr_html_()).lines
    assert [line for line, style in found if style == "adapter"] == ["(CHAIN) Adapting()", "(CHAIN) Adapting()"]
    assert len(found) == 6


def test_equal_siblings_are_shown_once() -> None:
    html = fl.Chain(fl.Linear(1, 1) for _ in range(5))._repr_html_()
    assert text_of(html).count("Linear") == 1
    assert "(x5)<i>2 float32</i>" in html


def test_ten_thousand_nodes_stay_small() -> None:
    wide = fl.Chain(fl.Chain(fl.Multiply(float(i)), fl.Lambda(len), nn.Linear(1, i % 7 + 1)) for i in range(2500))
    assert len(list(wide.modules())) == 10_001
    html = wide._repr_html_()
    assert len(html.encode()) < 600_000
    Reader(html)
    assert "... 1 more" in html

    class Wordy(fl.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

        def __str__(self) -> str:
            return f"{self.number}" + "word" * 1000

    html = fl.Chain(Wordy(i) for i in range(10_000))._repr_html_()
    assert "... 7,501 more" in html
    assert len(html.encode()) < 600_000


def test_deep_trees() -> None:
    chain = fl.Chain()
    for _ in range(300):
        chain = fl.Chain(chain)
    Reader(chain._repr_html_())


def test_plain_models() -> None:
    assert "Linear(in_features=1" in notebook.render(nn.Sequential(nn.Linear(1, 1)))
