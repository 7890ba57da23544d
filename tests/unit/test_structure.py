"""The package keeps the sizes and the doors that make it readable for a newcomer."""

import ast
import importlib
import pkgutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import extproc

PACKAGE = Path(extproc.__file__).parent
MODULE_LINES_MAX = 400
FUNCTION_LINES_MAX = 60
CONSTRUCTOR_PARAMETERS_MAX = 8
DOOR_LINES = range(3, 16)
# Packages whose every module decides without I/O; see the import contracts in pyproject.toml.
PURE = [
    "extproc.config",
    "extproc.errors",
    "extproc.headers",
    "extproc.policies",
    "extproc.tokenization",
]
IO_LIBRARIES = ["zmq", "grpc", "aiohttp"]


def sources() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if "_protos" not in path.parts]


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Without self; a bare `**settings` counts as one."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return len(named) - 1 + (arguments.vararg is not None) + (arguments.kwarg is not None)


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE.parent).as_posix()


def test_no_module_is_longer_than_a_reader_keeps_in_mind() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in sources()}
    assert {name: lines for name, lines in lengths.items() if lines > MODULE_LINES_MAX} == {}


def test_every_function_fits_a_screen() -> None:
    long = {
        f"{name_of(path)}:{one.lineno} {one.name}": (one.end_lineno or 0) - one.lineno + 1
        for path in sources()
        for one in functions(ast.parse(path.read_text()))
    }
    assert {name: lines for name, lines in long.items() if lines > FUNCTION_LINES_MAX} == {}


def test_constructors_take_few_parameters() -> None:
    counts = {
        f"{name_of(path)}:{one.lineno}": parameters(one)
        for path in sources()
        for one in functions(ast.parse(path.read_text()))
        if one.name == "__init__" and path.name != "build.py"
    }
    many = {name: count for name, count in counts.items() if count > CONSTRUCTOR_PARAMETERS_MAX}
    assert many == {}


def packages() -> list[str]:
    found = pkgutil.walk_packages([str(PACKAGE)], "extproc.")
    return [one.name for one in found if one.ispkg and "_protos" not in one.name]


@pytest.mark.parametrize("name", packages())
def test_each_package_says_at_its_door_what_it_does(name: str) -> None:
    door = importlib.import_module(name)
    doc = (door.__doc__ or "").strip()
    assert len(doc.splitlines()) in DOOR_LINES, f"{name}: {doc!r}"
    folder = Path(str(door.__file__)).parent
    modules = {path.stem for path in folder.glob("*.py")} | {
        path.parent.name for path in folder.glob("*/__init__.py")
    }
    public = set(door.__all__)
    assert public, f"{name} names nothing that others may import"
    for entry in public:
        assert entry in modules or hasattr(door, entry), f"{name}: no {entry}"


@pytest.mark.parametrize("name", PURE)
def test_pure_packages_load_no_io_library(name: str) -> None:
    script = (
        "import importlib, pkgutil, sys\n"
        f"root = importlib.import_module({name!r})\n"
        "for one in pkgutil.walk_packages(getattr(root, '__path__', []), root.__name__ + '.'):\n"
        "    importlib.import_module(one.name)\n"
        f"print(*[lib for lib in {IO_LIBRARIES!r} if lib in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_one_module_reads_headers() -> None:
    """What clients and workers send in headers is read in one place, where it can be reviewed."""
    reading = {
        name_of(path)
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr == "headers"
        and isinstance(node.value, ast.Attribute)
        and node.value.attr in ("request_headers", "response_headers", "headers")
    }
    assert reading == {"extproc/server/messages.py"}


def public_modules(package: str) -> set[str]:
    """The modules and packages that a door names; names that it re-exports are left out."""
    door = importlib.import_module(package)
    folder = Path(str(door.__file__)).parent
    return {
        name
        for name in door.__all__
        if (folder / f"{name}.py").exists() or (folder / name).is_dir()
    }


def private_modules(package: str) -> set[str]:
    folder = Path(str(importlib.import_module(package).__file__)).parent
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__"}
    return modules - public_modules(package)


def contract_of(package: str) -> dict[str, Any] | None:
    """The import contract that keeps others out of the package's private modules."""
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    for contract in settings["tool"]["importlinter"]["contracts"]:
        if contract.get("protected_modules") == [f"{package}.*"]:
            found: dict[str, Any] = contract
            return found
    return None


@pytest.mark.parametrize("package", [name for name in packages() if private_modules(name)])
def test_a_contract_protects_the_modules_that_the_door_does_not_name(package: str) -> None:
    contract = contract_of(package)
    assert contract is not None, f"pyproject.toml has no contract for {package}"
    assert contract["allowed_importers"] == [package]
    open_modules = {
        target.removeprefix(f"extproc.** -> {package}.").removesuffix(".*")
        for target in contract["ignore_imports"]
    }
    assert open_modules == public_modules(package)
