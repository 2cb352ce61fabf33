"""The list of methods: complete, true, and the page made of it up to date."""

from __future__ import annotations

import runpy
from dataclasses import dataclass
from pathlib import Path

import pytest

import adapters
from adapters.methods import METHODS

ROOT = Path(__file__).parents[2]


def test_every_method_is_described() -> None:
    described = METHODS.describe()
    assert {one.key for one in described} == METHODS.keys()
    for one in described:
        assert one.about.endswith((".", ":")) and one.paper and one.formula and one.layers and one.files, one.name
        assert getattr(adapters, one.name) is METHODS[one.key]
    assert repr(METHODS).count("\n") == len(described)


def test_the_page_is_up_to_date() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "site" / "methods_page.py"))["page"]
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == page(), "run `make docs`"


def test_a_key_is_that_of_one_method() -> None:
    @dataclass(frozen=True)
    class Other(adapters.Method):
        key = "lora"

    with pytest.raises(adapters.AdapterError, match="'lora' is that of LoRA: choose another"):
        adapters.register(Other)
    assert METHODS["lora"] is adapters.register(adapters.LoRA) is adapters.LoRA


def test_a_method_that_is_declared_again_takes_its_own_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def declare() -> type[adapters.Method]:
        @dataclass(frozen=True)
        class Again(adapters.Method):
            key = "again"

        return Again

    monkeypatch.setattr(METHODS, "_methods", dict(METHODS))
    adapters.register(declare())
    again = adapters.register(declare())
    assert METHODS["again"] is again


def test_a_method_without_a_key_is_refused() -> None:
    with pytest.raises(adapters.AdapterError, match='Method has no key: give it one, as in key = "mine"'):
        adapters.register(adapters.Method)
