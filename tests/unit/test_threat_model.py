"""Every row of docs/threat-model.md names tests, and they exist."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
PAGE = (TESTS.parent / "docs" / "threat-model.md").read_text()
_NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")
_ATTEMPTS = "| attempt |"


def rows() -> Iterator[str]:
    """The rows of the tables of attempts."""
    for table in re.findall(r"(?:^\|.*\n)+", PAGE, re.M):
        if table.startswith(_ATTEMPTS):
            yield from table.splitlines()[2:]


@pytest.mark.parametrize("row", list(rows()))
def test_each_attempt_names_a_test(row: str) -> None:
    assert _NAMED.findall(row.split("|")[3]), row


@pytest.mark.parametrize(("file", "name"), sorted(set(_NAMED.findall(PAGE))))
def test_each_named_test_exists(file: str, name: str) -> None:
    tree = ast.parse((TESTS / file).read_text())
    found = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert name in found


def test_the_page_has_many_rows() -> None:
    assert len(list(rows())) > 25
