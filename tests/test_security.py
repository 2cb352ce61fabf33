"""SECURITY.md: each test that it names is there, and its table is that of what is tried."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.faults.__main__ import BEGIN, END
from tests.faults.harness import FAULTS
from tests.faults.hub import Hub
from tests.faults.operations import operations

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "SECURITY.md").read_text()


def test_the_tests_that_are_named_are_there() -> None:
    named = re.findall(r"`(tests/\S+\.py)::(\w+)`", TEXT)
    assert len(named) > 20
    for file, test in named:
        defined = {node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if hasattr(node, "name")}
        assert test in defined, (file, test)


def test_the_table_is_that_of_what_is_tried() -> None:
    table = TEXT.partition(BEGIN)[2].partition(END)[0].split("\n\n")[0]
    header, _, *rows = [line.strip("|").split("|") for line in table.strip().splitlines()]
    assert [cell.strip() for cell in header[1:]] == list(FAULTS)
    assert [row[0].strip() for row in rows] == [operation.name for operation in operations(Hub({}))]
    assert "LOST" not in TEXT
    assert "not clearly said: 0 times" in TEXT
