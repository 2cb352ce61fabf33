"""Whether this package is as it was installed: not where another distribution has its files in the same folder.

That other one is AdapterHub's, `adapters`. Files of the last one installed take the place of the other's, and neither
works. Only Python's own modules are imported here, as nothing else can be relied on then.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import metadata

NAME = "fluxion-adapters"


def owners() -> list[str]:
    """Other installed distributions that have files in a package `adapters`, with their versions."""
    names = {*metadata.packages_distributions().get("adapters", ())} - {NAME}
    return [f"{name} {metadata.version(name)}" for name in sorted(names)]


def altered() -> list[str]:
    """Files of this package that are not as they were installed: others' are in their place, or none."""
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
    """Why this package cannot work as it is installed, with the way out; None if nothing is wrong."""
    others, files = owners(), altered()
    if others:
        uninstall = f"pip uninstall -y {' '.join(name.split()[0] for name in others)}"
        replaced = f", {len(files)} of them in the place of ours" if files else ""
        return (
            f"Another distribution, {', '.join(others)}, has the import name `adapters` too, and its files are among"
            f" those of {NAME}{replaced}. Keep the two in different environments. To mend this one:"
            f" {uninstall} && pip install --force-reinstall --no-deps {NAME}"
        )
    if files:
        return (
            f"{len(files)} of the files of {NAME} are missing or changed, such as {files[0]}."
            f" To mend this: pip install --force-reinstall --no-deps {NAME}"
        )
    return None
