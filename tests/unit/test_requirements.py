"""The lock files in requirements/ hold what pyproject.toml asks for, on every supported Python."""

import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
PYTHONS = ("3.11", "3.12", "3.13", "3.14")


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def environment_of(python: str) -> dict[str, str]:
    """What markers are compared with, on Linux with this Python."""
    return {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
    }


@cache
def locked(path: Path, python: str) -> dict[str, str]:
    """Name and version of each package that `path` installs on Linux with this Python."""
    environment = environment_of(python)
    versions: dict[str, str] = {}
    for line in re.findall(r"^(\w.*?) *\\?$", path.read_text(), re.M):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (pin,) = requirement.specifier
            assert pin.operator == "==", line
            assert versions.setdefault(canonicalize_name(requirement.name), pin.version) == (
                pin.version
            ), line
    return versions


def asked() -> Iterator[tuple[str, str]]:
    """Each file of the lock with each requirement that it must satisfy."""
    project = pyproject()
    groups: dict[str, list[str]] = project["dependency-groups"]
    service: list[str] = project["project"]["dependencies"]
    demo = service + project["project"]["optional-dependencies"]["demo"] + groups["build"]
    build = groups["build"] + project["build-system"]["requires"]
    files = {
        "build.txt": build,
        "service.txt": service,
        "demo.txt": demo,
        "dev.txt": demo + build + groups["test"] + groups["lint"],
        "xds-protos.txt": groups["xds-protos"],
        "kubernetes.txt": groups["kubernetes"],
    }
    assert sorted(files) == [path.name for path in LOCKS]
    assert set(groups) == {"build", "test", "lint", "xds-protos", "kubernetes"}
    for name, requirements in files.items():
        for requirement in requirements:
            yield name, requirement


@pytest.mark.parametrize(("name", "requirement"), sorted(set(asked())))
def test_each_requirement_is_locked_within_its_bounds(name: str, requirement: str) -> None:
    wanted = Requirement(requirement)
    for python in PYTHONS:
        if wanted.marker is not None and not wanted.marker.evaluate(environment_of(python)):
            continue
        versions = locked(ROOT / "requirements" / name, python)
        version = versions.get(canonicalize_name(wanted.name))
        assert version is not None, f"{name} has no {wanted.name} for Python {python}: `make lock`"
        assert wanted.specifier.contains(version), f"{name} has {version}: run `make lock`"


@pytest.mark.parametrize("python", PYTHONS)
def test_the_files_of_the_lock_agree_on_versions(python: str) -> None:
    every = locked(ROOT / "requirements" / "dev.txt", python)
    for path in LOCKS:
        if path.name in ("xds-protos.txt", "kubernetes.txt"):
            continue
        for name, version in locked(path, python).items():
            assert every[name] == version, f"{path.name}: {name}"


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_every_line_is_a_pin_with_hashes_and_no_index_is_named(path: Path) -> None:
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.M)
    entries = re.split(r"\n(?=\S)", text.strip())
    for entry in entries:
        assert re.fullmatch(
            r"\S+==\S+(?: ; [^\\\n]+)?(?: \\\n    --hash=sha256:[0-9a-f]{64})+", entry
        )
