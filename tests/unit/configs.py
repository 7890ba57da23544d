"""Small configurations for tests."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from extproc.config.loading import parse_config
from extproc.config.schema import Config
from extproc.errors import ConfigError

URL = "http://10.0.0.1:8000"


def discovery(*urls: str) -> dict[str, Any]:
    """The section for static workers."""
    return {"backend": "static_urls", "static_urls": {"urls": list(urls)}}


def raw_config(**sections: Any) -> dict[str, Any]:
    """The smallest good configuration, with sections added or replaced."""
    return {
        "models": [{"id": "m"}],
        "discovery": discovery(URL),
    } | sections


def config(**sections: Any) -> Config:
    return parse_config(raw_config(**sections))


def written(folder: Path, raw: object) -> str:
    """Path of a file with this configuration."""
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return str(path)


def at(path: str, value: object) -> dict[str, Any]:
    """The smallest configuration with one more key, given by its dotted path."""
    raw = raw_config()
    section: Any = raw
    *parents, name = path.replace("models[0]", "models.0").split(".")
    for parent in parents:
        section = (
            section[int(parent)] if isinstance(section, list) else section.setdefault(parent, {})
        )
    section[name] = value
    return raw


def problems_of(raw: object) -> list[str]:
    """The problems of a configuration, which must have at least one."""
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    assert caught.value.problems
    return caught.value.problems


def problem_of(raw: object) -> str:
    """The only problem of a configuration."""
    (problem,) = problems_of(raw)
    return problem
