"""The JSON Schema accepts what the loader accepts, and refuses wrong keys, types and bounds."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from extproc.cli import main
from extproc.config.json_schema import json_schema
from extproc.config.loading import parse_config
from extproc.errors import ConfigError
from tests.unit.configs import raw_config

ROOT = Path(__file__).resolve().parents[3]
SCHEMA = json_schema()
VALIDATOR = Draft202012Validator(SCHEMA)
EXAMPLES = sorted((ROOT / "envoy").glob("*/extproc.yaml"))
MODELINE = re.compile(r"# yaml-language-server: \$schema=(\S+)")
KeyPath = tuple[str | int, ...]


def resolved(node: dict[str, Any]) -> dict[str, Any]:
    """The node without references, and without null where that is one of two choices."""
    for option in node.get("anyOf", []):
        if option.get("type") != "null":
            node = {**option, **node}
    if "$ref" in node:
        return {**SCHEMA["$defs"][node["$ref"].rpartition("/")[2]], **node}
    return node


def walk(path: KeyPath, node: dict[str, Any]) -> Iterator[tuple[KeyPath, dict[str, Any]]]:
    """Every key of the configuration by its path, and the first item of each list of sections."""
    for name, child in node.get("properties", {}).items():
        here = resolved(child)
        yield (*path, name), here
        yield from walk((*path, name), here)
    if "$ref" in node.get("items", {}):
        item = resolved(node["items"])
        yield (*path, 0), item
        yield from walk((*path, 0), item)


KEYS = [(path, node) for path, node in walk((), resolved(SCHEMA)) if path[-1] != 0]
SECTIONS = [(), *(path for path, node in walk((), resolved(SCHEMA)) if "properties" in node)]


BACKENDS: dict[str | int, dict[str, Any]] = {
    "static_urls": {"urls": ["http://10.0.0.1:8000"]},
    "dns": {"urls": ["http://workers:8000"]},
    "k8s": {"namespace": "ns", "label_selector": "app=sglang"},
    "inference_pool": {"namespace": "ns", "name": "pool"},
    "k8s_pods": {"namespace": "ns", "label_selector": "app=sglang"},
}


def backend_of(path: KeyPath) -> str | int | None:
    """The backend of discovery whose section the path is in."""
    return path[1] if path[:1] == ("discovery",) and path[1:2] and path[1] in BACKENDS else None


def full(backend: str | int = "static_urls") -> dict[str, Any]:
    """A good configuration in which every section is there, but those of other backends."""
    model = {
        "id": "m",
        "policy": "min_ttft",
        "tokenizer_path": "/models/m",
        "kv_events": [{"endpoint": "tcp://*:5557", "block_size": 16}],
    }
    raw = raw_config(
        models=[model],
        server={"tls": {"cert_file": "c", "key_file": "k"}},
        envoy={"extproc": {"ca_file": "ca"}},
        discovery={"backend": backend, backend: dict(BACKENDS[backend])},
    )
    for path in SECTIONS:
        if backend_of(path) not in (None, backend):
            continue
        section: Any = raw
        for name in path:
            section = section.setdefault(name, {}) if isinstance(section, dict) else section[name]
    return raw


def problems_of_the_schema(raw: object) -> set[KeyPath]:
    """The paths of what is wrong; in an optional section, what is wrong inside it."""
    found = set()
    for error in VALIDATOR.iter_errors(raw):
        options = [one for one in error.context or [] if one.validator_value != "null"]
        found |= {tuple(one.absolute_path) for one in options or [error]}
    return found


def with_value(path: KeyPath, value: object) -> dict[str, Any]:
    raw = full(backend_of(path) or "static_urls")
    section: Any = raw
    for name in path[:-1]:
        section = section[name]
    section[path[-1]] = value
    return raw


def loads(raw: object) -> bool:
    try:
        parse_config(raw)
    except ConfigError:
        return False
    return True


def dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


def test_the_schema_itself_is_valid() -> None:
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_configuration_with_every_section_is_good(backend: str) -> None:
    assert loads(full(backend))
    assert VALIDATOR.is_valid(full(backend))


def test_every_key_has_a_description() -> None:
    assert [dotted(path) for path, node in KEYS if not node.get("description")] == []


@pytest.mark.parametrize("path", SECTIONS, ids=dotted)
def test_an_unknown_key_is_refused_in_every_section(path: KeyPath) -> None:
    raw = with_value((*path, "nonsense"), 1)
    assert not loads(raw)
    assert problems_of_the_schema(raw) == {path}


@pytest.mark.parametrize("path", [path for path, _ in KEYS], ids=dotted)
def test_a_wrong_type_is_refused_for_every_key(path: KeyPath) -> None:
    raw = with_value(path, [{}])
    assert not loads(raw)
    assert {where[: len(path)] for where in problems_of_the_schema(raw)} == {path}


@pytest.mark.parametrize(
    ("path", "bound", "beyond"),
    [
        (path, bound, bound + step)
        for path, node in KEYS
        for name, step in (("minimum", -1), ("maximum", 1))
        if (bound := node.get(name)) is not None
    ],
    ids=lambda value: dotted(value) if isinstance(value, tuple) else str(value),
)
def test_a_value_beyond_its_bounds_is_refused(path: KeyPath, bound: float, beyond: float) -> None:
    assert VALIDATOR.is_valid(with_value(path, bound))
    assert not VALIDATOR.is_valid(with_value(path, beyond))
    assert not loads(with_value(path, beyond))


VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-1, 100_000)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(
        ["", "x-name", "::", "sglang", "two_pass", "http://10.0.0.1:8000", "tcp://*:1"]
    )
    | st.dictionaries(st.sampled_from(["host", "x"]), st.integers(0, 2), max_size=1)
)


@given(st.sampled_from([path for path, _ in KEYS]), VALUES | VALUES.map(lambda value: [value]))
def test_the_schema_accepts_what_the_loader_accepts(path: KeyPath, value: object) -> None:
    raw = with_value(path, value)
    assert not loads(raw) or problems_of_the_schema(raw) == set()


@pytest.mark.parametrize(
    "raw",
    [
        {},
        raw_config(models=[]),
        raw_config(models=[{}]),
        raw_config(models=[{"id": "m", "policy": "min_ttft"}]),
        raw_config(models=[{"id": "m", "policy": "cache_aware_zmq", "tokenizer_path": None}]),
        raw_config(models=[{"id": "m", "policy": "min_ttft", "tokens_from": "service"}]),
        raw_config(discovery={"backend": "static_urls"}),
        raw_config(discovery={"backend": "k8s"}),
        raw_config(discovery={"backend": "static_urls", "static_urls": {"urls": []}}),
        raw_config(observability={"log_level": "loud"}),
        raw_config(server=None),
        [],
        None,
    ],
)
def test_what_is_missing_or_unknown_is_refused(raw: object) -> None:
    assert not loads(raw)
    assert not VALIDATOR.is_valid(raw)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name)
def test_every_example_is_valid(path: Path) -> None:
    for raw in configurations(path.read_text()):
        assert list(VALIDATOR.iter_errors(raw)) == []
        parse_config(raw)


def configurations(text: str) -> list[Any]:
    """The file itself, or what its Kubernetes ConfigMaps hold."""
    documents = list(yaml.safe_load_all(text))
    if "kind" not in documents[0]:
        return documents
    held = [one["data"]["extproc.yaml"] for one in documents if one["kind"] == "ConfigMap"]
    assert held
    return [yaml.safe_load(text) for text in held]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name)
def test_the_first_line_of_an_example_names_the_schema(path: Path) -> None:
    """Not of a Kubernetes manifest: an editor would check the manifest itself with it."""
    text = path.read_text()
    found = MODELINE.match(text)
    if "kind: ConfigMap" in text:
        assert found is None
    else:
        assert found is not None
        assert (path.parent / found[1]).resolve() == ROOT / "docs" / "schema.json"


@pytest.mark.parametrize("page", ["README.md", "docs/configuration.md", "docs/disaggregation.md"])
def test_every_configuration_in_a_page_is_valid(page: str) -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    assert blocks
    for block in blocks:
        raw = yaml.safe_load(block)
        assert list(VALIDATOR.iter_errors(raw)) == []
        parse_config(raw)


def test_the_command_prints_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert capsys.readouterr().out == (ROOT / "docs" / "schema.json").read_text()
