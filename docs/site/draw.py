"""The drawings of the pages, made by `make docs`.

A drawing is lines, boxes and texts at places in pixels. Its colours are that of the text around it, more or less of it,
and one other: it can be read on any ground.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "drawings"
ROW, INDENT, HEIGHT = 40, 34, 30  # of a tree: from line to line, from level to level, and of a box
LETTER = 7.7  # The width of a letter, roughly; boxes have room to spare.

# In a page of its own a drawing finds out itself whether the ground is dark.
_STYLE = "<style>svg{color:#24292f}@media(prefers-color-scheme:dark){svg{color:#e6edf3}}</style>"


@dataclass
class Drawing:
    """What is drawn.

    Attributes:
        title: What is to be seen, in a sentence, for those who cannot see it.
        width: In pixels.
        height: In pixels.
        parts: The elements.
    """

    title: str
    width: int
    height: int
    parts: list[str] = field(default_factory=list)

    def text(
        self, x: float, y: float, text: str, *, anchor: str = "start", faint: bool = False, bold: bool = False
    ) -> None:
        look = ' opacity=".65"' if faint else ' font-weight="600"' if bold else ""
        self.parts.append(f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{look}>{escape(text)}</text>')

    def line(self, *points: tuple[float, float], arrow: bool = False, faint: bool = False) -> None:
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
        look = ' opacity=".45"' if faint else ""
        self.parts.append(f'<path d="{path}" fill="none" stroke="currentColor" stroke-width="1.4"{look}/>')
        if arrow:
            (x0, y0), (x, y) = points[-2:]
            angle = math.degrees(math.atan2(y - y0, x - x0))
            turn = f"translate({x:g} {y:g}) rotate({angle:.3f})"
            self.parts.append(f'<path d="M0 0 L-10 4.5 L-10 -4.5 z" transform="{turn}"{look}/>')

    def box(self, x: float, y: float, text: str, *, kind: str = "plain", width: float | None = None) -> None:
        """A box with a text in it, of which `y` is the middle."""
        width = width or 22 + LETTER * len(text)
        colour = "#5c6bc0" if kind != "plain" else "currentColor"
        fill = {"plain": ".05", "adapter": ".16", "branch": ".38"}[kind]
        self.parts.append(
            f'<rect x="{x:g}" y="{y - HEIGHT / 2:g}" width="{width:g}" height="{HEIGHT}" rx="6" fill="{colour}"'
            f' fill-opacity="{fill}" stroke="{colour}" stroke-width="1.4"/>'
        )
        self.text(x + width / 2, y + 5, text, anchor="middle")

    def tree(self, x: float, y: float, nodes: list[tuple[int, str, str]]) -> None:
        """A tree, one node in a row: its level, its name, and the kind of its box."""
        above: dict[int, float] = {}
        for row, (level, name, kind) in enumerate(nodes):
            middle = y + row * ROW
            if level:
                left = x + (level - 1) * INDENT + 16
                self.line((left, above[level - 1] + HEIGHT / 2), (left, middle), (x + level * INDENT, middle))
            self.box(x + level * INDENT, middle, name, kind=kind)
            above[level] = middle

    def render(self) -> str:
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}"'
            f' class="drawing" role="img" font-family="ui-monospace,Menlo,Consolas,monospace" font-size="13"'
            f' fill="currentColor"><title>{escape(self.title)}</title>{_STYLE}{"".join(self.parts)}</svg>\n'
        )


def tree() -> Drawing:
    drawing = Drawing("A chain with three children, of which the second is a chain too.", 620, 260)
    nodes = [
        (0, "Chain", "plain"),
        (1, "Linear", "plain"),
        (1, "Residual", "plain"),
        (2, "LayerNorm", "plain"),
        (2, "Linear", "plain"),
        (1, "Linear", "plain"),
    ]
    drawing.tree(10, 26, nodes)
    for row, key in enumerate(["", "model.Linear_1, model[0]", "model.Residual", "model.Residual.LayerNorm",
                               "model.Residual.Linear", "model.Linear_2, model[-1]"]):  # fmt: skip
        drawing.text(250, 31 + row * ROW, key, faint=True)
    drawing.line((470, 60), (470, 232), arrow=True, faint=True)
    drawing.text(484, 151, "run in this order", faint=True)
    return drawing


def adapter() -> Drawing:
    drawing = Drawing("An adapter takes the place of a layer, which becomes its child, and comes back.", 700, 236)
    for x, title in ((10, "before"), (235, "injected"), (530, "ejected")):
        drawing.text(x, 20, title, bold=True)
    drawing.tree(10, 52, [(0, "Chain", "plain"), (1, "Linear", "plain"), (1, "ReLU", "plain")])
    injected = [
        (0, "Chain", "plain"),
        (1, "Adapted", "adapter"),
        (2, "Linear", "plain"),
        (2, "LoRA style", "branch"),
        (1, "ReLU", "plain"),
    ]
    drawing.tree(235, 52, injected)
    drawing.tree(530, 52, [(0, "Chain", "plain"), (1, "Linear", "plain"), (1, "ReLU", "plain")])
    drawing.line((160, 72), (215, 72), arrow=True)
    drawing.line((455, 72), (510, 72), arrow=True)
    drawing.text(482, 62, "eject", anchor="middle", faint=True)
    drawing.text(187, 62, "inject", anchor="middle", faint=True)
    drawing.text(546, 172, "the same objects", faint=True)
    return drawing


def patch() -> Drawing:
    drawing = Drawing("Two patches in one model: each is a set of branches, one at each of its layers.", 700, 236)
    for row, name in enumerate(("q_proj", "v_proj", "mlp.up")):
        y = 80 + row * 56
        drawing.box(10, y, name, width=100)
        drawing.box(210, y, "LoRA", kind="branch", width=76)
        drawing.line((110, y), (210, y))
        if row < 2:
            drawing.box(370, y, "LoRA", kind="branch", width=76)
            drawing.line((286, y), (370, y))
    for x, y, height, name in ((192, 44, 176, "style"), (352, 44, 120, "pose")):
        drawing.parts.append(
            f'<rect x="{x}" y="{y}" width="112" height="{height}" rx="10" fill="none" stroke="#5c6bc0"'
            ' stroke-width="1.6" stroke-dasharray="5 4"/>'
        )
        drawing.text(x + 56, 32, f'"{name}"', anchor="middle", bold=True)
    drawing.text(500, 84, "style.scale = 0.5", faint=True)
    drawing.text(500, 112, "style.enabled = False", faint=True)
    drawing.text(500, 140, "style.merge()", faint=True)
    drawing.text(500, 168, "style.eject()", faint=True)
    drawing.text(500, 52, "as a whole:", bold=True)
    return drawing


def context() -> Drawing:
    drawing = Drawing("Two threads use one model at once, each with adapters of its own choice.", 700, 216)
    rows = [
        ("thread 1", 'use(model, "style")', 60),
        ("thread 2", 'use(model, {"pose": 0.3})', 108),
        ("thread 3", "use(model)", 156),
    ]
    drawing.box(330, 108, "model", width=90)
    for name, call, y in rows:
        drawing.text(10, y + 5, name, bold=True)
        drawing.text(92, y + 5, call, faint=True)
        drawing.line((296, y), (330, 108), arrow=True, faint=True)
        drawing.line((420, 108), (462, y), arrow=True, faint=True)
    drawing.box(462, 60, "layers + style", kind="branch", width=180)
    drawing.box(462, 108, "layers + 0.3 · pose", kind="adapter", width=180)
    drawing.box(462, 156, "layers", width=180)
    drawing.text(350, 206, "none sees what the others have chosen", anchor="middle", faint=True)
    return drawing


def icon() -> Drawing:
    drawing = Drawing("fluxion-adapters", 32, 32)
    drawing.line((8, 6), (8, 24), (16, 24))
    drawing.parts.append('<rect x="4" y="3" width="14" height="9" rx="2.5" fill="#5c6bc0"/>')
    drawing.parts.append('<rect x="15" y="19" width="14" height="9" rx="2.5" fill="#7986cb"/>')
    return drawing


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for made in (tree, adapter, patch, context, icon):
        (FOLDER / f"{made.__name__}.svg").write_text(made().render(), encoding="utf-8")
