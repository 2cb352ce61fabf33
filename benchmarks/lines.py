"""Lines of code of each method, here and in peers."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path

from adapters.methods import METHODS
from adapters.methods.core.method import Method
from benchmarks.harness import Row, report

# Sources of the same method in peers: folders of `peft.tuners`, and modules of `lycoris.modules`.
PEFT = {
    "adalora": "adalora",
    "boft": "boft",
    "c3a": "c3a",
    "delora": "delora",
    "fourierft": "fourierft",
    "glora": "glora",
    "gralora": "gralora",
    "hira": "hira",
    "hra": "hra",
    "ia3": "ia3",
    "loha": "loha",
    "lokr": "lokr",
    "lora": "lora",
    "miss": "miss",
    "norm": "ln_tuning",
    "oft": "oft",
    "prefix_tuning": "prefix_tuning",
    "prompt_tuning": "prompt_tuning",
    "randlora": "randlora",
    "road": "road",
    "shira": "shira",
    "trainable_tokens": "trainable_tokens",
    "vblora": "vblora",
    "vera": "vera",
}
LYCORIS = {
    "diag-oft": "diag_oft",
    "full": "full",
    "ia3": "ia3",
    "loha": "loha",
    "lokr": "lokr",
    "lora": "locon",
    "lycoris-glora": "glora",
    "norm": "norms",
    "output-boft": "boft",
}


def main() -> None:
    rows: list[Row] = []
    for key, method in sorted(METHODS.items(), key=lambda item: item[1].__name__.lower()):
        ours = Path(inspect.getfile(method))
        rows.append(
            {
                "method": method.__name__,
                "lines here": str(count(ours)),
                "PEFT": _peer("peft", "tuners", PEFT.get(key), "*.py"),
                "LyCORIS": _peer("lycoris", "modules", LYCORIS.get(key), None),
            }
        )
    shared = Path(inspect.getfile(Method)).parent.glob("*.py")
    rows.append({"method": "what all share", "lines here": str(sum(map(count, shared))), "PEFT": None, "LyCORIS": None})
    report(
        "lines", "Lines of each method's files, blank ones and comments included. A file may have two methods.", rows
    )


def _peer(package: str, folder: str, name: str | None, pattern: str | None) -> str | None:
    found = importlib.util.find_spec(package) if name else None
    if found is None or found.origin is None:
        return None
    home = Path(found.origin).parent / folder
    files = sorted((home / str(name)).glob(pattern)) if pattern else [home / f"{name}.py"]
    return f"{sum(map(count, files)):,}"


def count(path: Path) -> int:
    """Number of lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


if __name__ == "__main__":
    main()
