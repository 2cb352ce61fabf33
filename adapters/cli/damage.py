"""Check of the installed files, which another distribution may have overwritten.

That other one is AdapterHub's `adapters`, with the same import name: the files of the last one installed replace the
other's, and neither works. Only the standard library is imported here, as nothing else can be relied on then.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import metadata

NAME = "fluxion-adapters"


@cache
def owners() -> list[str]:
    """Other installed distributions that have files in a package `adapters`, with their versions."""
    names = {*metadata.packages_distributions().get("adapters", ())} - {NAME}
    return [f"{name} {metadata.version(name)}" for name in sorted(names)]


def altered() -> list[str]:
    """Files of this package that are missing or have another hash than when they were installed."""
    try:
        files = metadata.files(NAME) or []
    except metadata.PackageNotFoundError:  # used without being installed
        return []
    found: list[str] = []
    for file in files:
        if file.parts[0] == "adapters" and file.hash is not None:
            try:
                content = file.read_binary()
            except OSError:
                content = b""
            digest = hashlib.new(file.hash.mode, content).digest()
            if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value:
                found.append(str(file))
    return found


def damage() -> str | None:
    """Message on why this installation cannot work and how to repair it; None if nothing is wrong."""
    others, files = owners(), altered()
    if others:
        uninstall = f"pip uninstall -y {' '.join(name.split()[0] for name in others)}"
        replaced = f", {len(files)} of them in the place of ours" if files else ""
        return (
            f"Another distribution, {', '.join(others)}, has the import name `adapters` too, and its files are among"
            f" those of {NAME}{replaced}. Keep the two in different environments. To repair this one:"
            f" {uninstall} && pip install --force-reinstall --no-deps {NAME}"
        )
    if files:
        return (
            f"{len(files)} of the files of {NAME} are missing or changed, such as {files[0]}."
            f" To repair this: pip install --force-reinstall --no-deps {NAME}"
        )
    return None
