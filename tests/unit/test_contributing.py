"""The pages for people who work on the code name targets, files and modules that exist."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("CONTRIBUTING.md", "README.md")
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
COMMAND = re.compile(r"(?:`|^)make ((?:[A-Z]+=\S+ )*)([a-z0-9-]+)", re.M)


def text(page: str) -> str:
    return (ROOT / page).read_text()


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_that_is_named_exists(page: str) -> None:
    commands = COMMAND.findall(text(page))
    assert commands
    assert {target for _, target in commands} <= TARGETS


def test_every_target_is_declared_phony_and_explained() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", text("Makefile"), re.M)
    assert phony is not None
    assert set(phony[1].split()) == TARGETS
    named = {target for _, target in COMMAND.findall(text("CONTRIBUTING.md"))}
    assert named == TARGETS - {"clean"}


def test_every_path_that_contributors_are_sent_to_exists() -> None:
    prose = re.sub(r"(?ms)^```.*?^```", "", text("CONTRIBUTING.md"))
    paths = [
        quoted
        for quoted in re.findall(r"`([\w./-]+)`", prose)
        if "/" in quoted or quoted.endswith((".py", ".md", ".toml"))
    ]
    assert len(paths) > 10
    for path in paths:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES)
def test_every_module_that_is_run_exists(page: str) -> None:
    for module in re.findall(r"python -m ([\w.]+)", text(page)):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_the_names_in_the_examples_of_tests_exist() -> None:
    examples = "".join(re.findall(r"(?ms)^```python\n(.*?)^```", text("CONTRIBUTING.md")))
    called = set(re.findall(r"(?<!def )\b([a-z_]\w+)\(", examples))
    sources = text("tests/protocol/exchange.py") + text("tests/e2e/conftest.py")
    assert {"serving", "launch", "llm_body"} <= called
    for name in called:
        assert re.search(rf"\bdef {name}\(|\b{name}\(", sources), name


def test_ci_calls_the_targets_that_contributors_use() -> None:
    called = re.findall(r"^ *make ([\w-]+)", text(".ci/run"), re.M)
    real = ["test-k8s", "test-gateways", "test-engines"]
    assert called == ["test", "lint", "wheel", "newest", *real]


def test_the_docker_build_gets_every_file_that_it_copies() -> None:
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", text("Dockerfile"), re.M)
    sources = {source for line in copied for source in line.split()}
    let_through = set(re.findall(r"^!(\S+)", text(".dockerignore"), re.M))
    assert sources == let_through
    assert all((ROOT / source).exists() for source in sources)


def test_the_changelog_has_the_version_of_the_package_and_the_usual_sections() -> None:
    version = tomllib.loads(text("pyproject.toml"))["project"]["version"]
    titles = re.findall(r"^## \[(.+?)\]( - \d{4}-\d{2}-\d{2})?$", text("CHANGELOG.md"), re.M)
    names = [name for name, _ in titles]
    assert names[0] == "Unreleased"
    assert names[1] == version
    assert all(date for name, date in titles if name != "Unreleased")
    sections = set(re.findall(r"^### (.*)$", text("CHANGELOG.md"), re.M))
    assert sections <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
