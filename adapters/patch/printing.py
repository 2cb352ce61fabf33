"""Printing of a patch: a line, or a table of its layers."""

from __future__ import annotations

from adapters.patch.merge import is_merged, is_partly_merged
from adapters.patch.parameters import named_weights, shared_weights
from adapters.patch.record import PatchRecord


def line(patch: PatchRecord) -> str:
    """The name and the size of a patch in one line."""
    return f"<Patch {patch.name!r}, {_size(patch)}>"


def table(patch: PatchRecord) -> str:
    """The state of a patch, a row for each layer, and the size."""
    rows = [("path", "method", "parameters")]
    for attachment in patch.attachments:
        branch = attachment.branch
        count = sum(parameter.numel() for name, parameter in branch.named_weights() if name not in branch.common)
        rows.append((attachment.path, str(branch.method), f"{count:,}"))
    rows += [("all of these", name, f"{parameter.numel():,}") for name, parameter in shared_weights(patch)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    title = f"Patch {patch.name!r}: {_state(patch)}, scale {patch.scale:g}{'' if patch.enabled else ', disabled'}"
    body = (f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}".rstrip() for a, b, c in rows)
    return "\n".join([title, *(() if patch.evicted else body), f"  {_size(patch)}"])


def _state(patch: PatchRecord) -> str:
    if patch.evicted:
        return "evicted"
    if is_partly_merged(patch):
        return "merged" if is_merged(patch) else "injected, merged in part"
    return "injected" if patch.injected else "ejected"


def _size(patch: PatchRecord) -> str:
    if patch.evicted:
        return "evicted: its tensors are freed"
    count = sum(parameter.numel() for _, parameter in named_weights(patch))
    return f"{len(patch.attachments)} layers, {count:,} parameters"
