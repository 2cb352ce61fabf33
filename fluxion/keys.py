"""Keys of the children of a chain: class names, numbered when they repeat."""

from __future__ import annotations

from itertools import islice

from torch import nn

Children = dict[str, nn.Module]


def find_key(children: Children, name: str) -> str | None:
    """A key itself, or else the key of a position: `Linear_2` is the second Linear, `Linear` the only one.

    Keys never change, so after insertions and removals the two may differ.
    """
    if name in children:
        return name
    class_name, _, number = name.rpartition("_")
    if not number.isdecimal():
        class_name, number = name, ""
    keys = [key for key, child in children.items() if type(child).__name__ == class_name]
    if number:
        return keys[int(number) - 1] if 1 <= int(number) <= len(keys) else None
    return keys[0] if len(keys) == 1 else None


def key_at(children: Children, index: int) -> str | None:
    """Key at an index, which counts from the end when negative; None when it is out of range."""
    count = len(children)
    position = index + count if index < 0 else index
    if not 0 <= position < count:
        return None
    if position > count // 2:  # From the nearer end.
        return next(islice(reversed(children), count - 1 - position, None))
    return next(islice(children, position, None))


def new_key(children: Children, suffixes: dict[str, int], class_name: str, numbered: bool) -> str:
    """A free key: the class name, or with `numbered` or where it is taken, the class name and the next number.

    Args:
        children: The children that have keys.
        suffixes: The last number given by class name, which is updated.
        class_name: Class name of the new child.
        numbered: Number the key even when the class name is free.
    """
    number = suffixes.get(class_name, 0) + 1
    key = f"{class_name}_{number}" if numbered or number > 1 else class_name
    while key in children:
        number += 1
        key = f"{class_name}_{number}"
    suffixes[class_name] = number
    return key


def release_key(suffixes: dict[str, int], key: str, class_name: str) -> None:
    """Make the number of a removed child's key free again, if it is the last one given."""
    number = suffixes.get(class_name, 0)
    if key == f"{class_name}_{number}" or (key == class_name and number == 1):
        suffixes[class_name] = number - 1
