"""The notebook view of a patch."""

from __future__ import annotations

from html import escape

_MOST_LINES = 200


def as_html(text: str) -> str:
    """The table that `print(patch)` shows, escaped, with its layers folded under the title."""
    title, *lines = (
        escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line))
        for line in text.splitlines()
    )
    more = [f"  ... and {len(lines) - _MOST_LINES:,} lines more"] if len(lines) > _MOST_LINES else []
    body = "\n".join([*lines[:_MOST_LINES], *more])
    return f'<details class="fluxion-patch"><summary>{title}</summary><pre>{body}</pre></details>'
