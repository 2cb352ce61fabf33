"""Text of a tree: one line per node, in the format of Refiners' repr."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn


@dataclass(slots=True)
class Node:
    """A printed line and the lines below it.

    Attributes:
        text: The line.
        class_name: Class name of the module; siblings of one class are numbered.
        shape: Number of the subtree's text: equal for two nodes exactly when their subtrees print the same.
        module: The module shown, the first one of a folded run.
        key: Key of the module in its parent.
    """

    text: str
    class_name: str
    shape: int
    module: nn.Module
    key: str = ""
    children: list[Node] = field(default_factory=list)


def label(module: nn.Module) -> str:
    """Line of one module, without its children."""
    tag = getattr(type(module), "_tag", "")
    if tag and module._show_only_tag():  # type: ignore[operator]
        return f"({tag})"
    if hasattr(type(module), "_label"):
        text = module._label()  # type: ignore[operator]
    else:
        text = f"{type(module).__name__}({' '.join(module.extra_repr().split())})"
    return f"({tag}) {text}" if tag else text


def build(root: nn.Module, note: Callable[[nn.Module], str] = lambda module: "") -> Node:
    """Lines of a module and of everything below it, plain `torch.nn` modules included.

    Args:
        root: The module.
        note: Text to append to the line of each module.
    """
    shapes: dict[object, int] = {}

    def visit(module: nn.Module, key: str) -> Node:
        children = [visit(child, name) for name, child in module._modules.items() if child is not None]
        text, class_name = label(module) + note(module), type(module).__name__
        identity = (text, class_name, tuple(child.shape for child in children))
        return Node(text, class_name, shapes.setdefault(identity, len(shapes)), module, key, children)

    return visit(root, "")


def fold(node: Node) -> Node:
    """Fold each run of successive siblings that print alike into one, marked `(xN)`, in place."""
    folded: list[Node] = []
    counts: list[int] = []
    for child in node.children:
        if folded and folded[-1].shape == child.shape:
            counts[-1] += 1
        else:
            folded.append(child)
            counts.append(1)
    for child, count in zip(folded, counts, strict=True):
        if count > 1:
            child.text += f" (x{count})"
        fold(child)
    node.children = folded
    return node


def lines(node: Node, depth: int = -1) -> list[tuple[str, Node]]:
    """Printed lines with their nodes, `depth` levels deep, or all levels when negative."""
    out: list[tuple[str, Node]] = []

    def visit(node: Node, text: str, indent: str, branch: str, depth: int) -> None:
        if depth == 0 and node.children:
            out.append((f"{indent}{branch}{text} ...", node))
            return
        out.append((f"{indent}{branch}{text}", node))
        indent += "│   " if branch == "├── " else "    "
        siblings = Counter(child.class_name for child in node.children)
        seen: Counter[str] = Counter()
        for position, child in enumerate(node.children, start=1):
            seen[child.class_name] += 1
            number = f" #{seen[child.class_name]}" if siblings[child.class_name] > 1 else ""
            corner = "└── " if position == len(node.children) else "├── "
            visit(child, child.text + number, indent, corner, max(depth - 1, -1))

    visit(node, node.text, "", "", depth)
    return out


def render(module: nn.Module, depth: int = -1, note: Callable[[nn.Module], str] = lambda module: "") -> str:
    """Text of the tree below a module, `depth` levels deep, or all levels when negative, with notes as in `build`."""
    return "\n".join(line for line, _ in lines(fold(build(module, note)), depth))
