"""HTML of a tree for notebooks: nodes that open and close."""

from __future__ import annotations

from collections import deque
from html import escape

from torch import nn

from fluxion.printing.tree import Node, build, fold

_MAX_NODES = 2500  # Uppermost nodes first; with _MAX_TEXT it keeps the HTML of any model well under a megabyte.
_MAX_TEXT = 160
_OPEN_LEVELS = 2

_STYLE = """<style>
.fluxion-tree {font-family: monospace; white-space: nowrap; overflow-x: auto}
.fluxion-tree div, .fluxion-tree details {margin-left: 1.2em}
.fluxion-tree summary {cursor: pointer; margin-left: -1.2em}
.fluxion-tree i {opacity: 0.6; margin-left: 1em}
.fluxion-tree .adapter {background: rgba(255, 170, 0, 0.18); border-left: 3px solid rgb(255, 150, 0)}
</style>"""


def render(module: nn.Module) -> str:
    """HTML of the tree below a module, with the parameter count and dtypes of each node.

    Nodes whose class sets `_highlight` have the CSS class `adapter`. Equal successive siblings are folded into one,
    and the deepest nodes of a very large tree are counted instead of shown.
    """
    root = fold(build(module))
    return f'{_STYLE}<div class="fluxion-tree">{_html(root, _uppermost(root), level=0)}</div>'


def _uppermost(root: Node) -> set[int]:
    """Ids of the nodes to show, level by level up to the limit."""
    queue, shown = deque([root]), set[int]()
    while queue and len(shown) < _MAX_NODES:
        node = queue.popleft()
        shown.add(id(node))
        queue.extend(node.children)
    return shown


def _html(node: Node, shown: set[int], level: int) -> str:
    text = node.text if len(node.text) <= _MAX_TEXT else f"{node.text[: _MAX_TEXT - 3]}..."
    line = f"{escape(text)}{_parameters(node.module)}"
    style = ' class="adapter"' if getattr(type(node.module), "_highlight", False) else ""
    if not node.children:
        return f"<div{style}>{line}</div>"
    inside = "".join(_html(child, shown, level + 1) for child in node.children if id(child) in shown)
    hidden = sum(id(child) not in shown for child in node.children)
    more = f"<div>... {hidden:,} more</div>" if hidden else ""
    state = " open" if level < _OPEN_LEVELS else ""
    return f"<details{style}{state}><summary>{line}</summary>{inside}{more}</details>"


def _parameters(module: nn.Module) -> str:
    """Parameter count and dtypes of a module as HTML."""
    parameters = list(module.parameters())
    if not parameters:
        return ""
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters})
    return f"<i>{sum(parameter.numel() for parameter in parameters):,} {', '.join(dtypes)}</i>"
