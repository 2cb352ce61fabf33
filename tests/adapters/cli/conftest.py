from __future__ import annotations

from tests.adapters.cli.files import kohya, small, style, tuned
from tests.weights.conftest import hub, hub_home

__all__ = ["hub", "hub_home", "kohya", "small", "style", "tuned"]
