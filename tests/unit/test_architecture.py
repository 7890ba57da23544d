"""Every file and every name that docs/architecture.md mentions exists."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
_QUOTED = re.compile(r"`([^`\n]+)`")
_FILE = re.compile(r"([\w./-]+\.(?:py|md|toml|proto)|(?:[\w-]+/)+)(?:: ([\w.]+))?")


def mentions() -> Iterator[tuple[str, str]]:
    """(file or folder, name in it or "") of every path in backticks, in the order of the page."""
    prose = re.sub(r"(?ms)^```.*?^```", "", PAGE)
    for quoted in _QUOTED.findall(prose.replace("\n", " ")):
        if found := _FILE.fullmatch(quoted):
            yield found[1], found[2] or ""


def resolved(path: str) -> Path | None:
    for base in (ROOT / "extproc", ROOT):
        if (base / path).exists():
            return base / path
    return None


@cache
def names(path: Path) -> frozenset[str]:
    """Top-level names of a module, and `Class.member` for what its classes define."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                found.add(name)
            case ast.ClassDef(name=name, body=body):
                found.add(name)
                for member in body:
                    if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
                        found.add(f"{name}.{member.name}")
    return frozenset(found)


@pytest.mark.parametrize(("path", "name"), sorted(set(mentions())))
def test_what_the_page_names_exists(path: str, name: str) -> None:
    file = resolved(path)
    assert file is not None, f"docs/architecture.md names {path}, which is not there"
    if name:
        assert name in names(file), f"docs/architecture.md names {name}, which {path} lacks"


def test_the_page_names_many_places() -> None:
    found = set(mentions())
    assert len(found) > 60
    assert sum(1 for _, name in found if name) > 30


def test_every_package_is_on_the_page() -> None:
    packages = {path.parent.name for path in (ROOT / "extproc").glob("*/__init__.py")} - {"_protos"}
    assert [name for name in sorted(packages) if not re.search(rf"\b{name}\b", PAGE)] == []


def test_the_glossary_is_sorted_and_explains_each_term_once() -> None:
    glossary = PAGE.split("## Glossary", 1)[1]
    terms = re.findall(r"(?m)^\| ([^|]+) \|", glossary)[2:]
    assert terms == sorted(set(terms), key=str.casefold)
    assert 25 <= len(terms) <= 50
