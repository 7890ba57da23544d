"""An engine is found by its name and the version that a worker says."""

from typing import get_args

import pytest

from extproc.config.models import ModelConfig
from extproc.engines.engine import DEFAULT_ENGINE, ENGINE_NAMES, EngineName, engine_named


def test_the_names_are_those_of_the_configuration() -> None:
    assert get_args(EngineName) == ENGINE_NAMES
    assert ModelConfig(id="m").engine == DEFAULT_ENGINE.name


@pytest.mark.parametrize("version", ["", "0.32.0", "0.32.0+cpu", "0.1", "99.0", "v1", "nightly"])
@pytest.mark.parametrize("name", ENGINE_NAMES)
def test_each_version_has_rules(name: EngineName, version: str) -> None:
    assert engine_named(name, version).name == name


def test_without_a_name_it_is_the_default_engine() -> None:
    assert engine_named(None) is DEFAULT_ENGINE
    assert engine_named(None, "0.32.0") is DEFAULT_ENGINE


@pytest.mark.parametrize(
    ("version", "read"),
    [
        ("0.32.0", True),
        ("0.32.9", True),
        ("0.32.0rc1+cpu", True),
        ("0.33.0", False),
        ("0.31.2", False),
        ("0.5.0", False),
        ("1.0", False),
        ("", True),
        ("dev", True),
    ],
)
def test_versions_outside_those_that_were_read_are_noticed(version: str, read: bool) -> None:
    assert engine_named("vllm").was_read(version) is read
