"""Which keys differ between two configurations, and which of them need a restart."""

from collections.abc import Iterator
from typing import Any, get_type_hints

import msgspec
import pytest
from msgspec import Struct

from extproc.config.changes import HOW_CHANGED, Changes, compare
from extproc.config.loading import section_type
from extproc.config.schema import Config
from tests.unit.configs import at, config, discovery, raw_config


def keys(section: type[Struct], path: str = "") -> Iterator[str]:
    """All keys of the schema, without the sections that are always there once."""
    hints = get_type_hints(section, include_extras=True)
    for field in msgspec.structs.fields(section):
        hint = hints[field.name]
        key = f"{path}.{field.encode_name}" if path else field.encode_name
        inner = section_type(hint)
        if inner is None:
            yield key
            continue
        if "list[" in str(hint):
            key += "[]"
        if "list[" in str(hint) or "None" in str(hint) or "Unset" in str(hint):
            yield key
        yield from keys(inner, key)


def test_every_key_of_the_configuration_is_classified() -> None:
    """A new key: decide in extproc/config/changes.py whether it can change in a running service."""
    assert sorted(HOW_CHANGED) == sorted(keys(Config))


def changes(old: dict[str, Any], new: dict[str, Any]) -> Changes:
    from_raw = (config(**old), config(**new))
    return compare(*from_raw)


def test_equal_configurations_do_not_differ() -> None:
    found = changes({}, {})
    assert not found
    assert (found.live, found.restart) == ((), ())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("server.step_deadline_secs", 1),
        ("server.max_requests", 5),
        ("observability.log_level", "debug"),
        ("models[0].policy", "random"),
        ("models[0].circuit_breaker.threshold", 9),
        ("proxy.fallback_workers", 0),
        ("kv.max_pages", 5000),
        ("workers.api_key", "secret"),
        ("pd.decode", "inline"),
    ],
)
def test_a_key_that_is_applied_is_named_by_its_path(path: str, value: object) -> None:
    assert compare(config(), config(**at(path, value))) == Changes((path,), ())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("server.port", 9003),
        ("server.max_body_bytes", 2048),
        ("server.tls", {"cert_file": "c", "key_file": "k"}),
        ("load.release", "estimate"),
        ("envoy.cluster", "others"),
        ("envoy.endpoints_file", "/run/workers.json"),
    ],
)
def test_a_key_that_needs_a_restart_is_named_apart(path: str, value: object) -> None:
    raw = at(path, value)
    if path == "server.tls":
        raw["envoy"] = {"extproc": {"ca_file": "ca"}}
    assert path in compare(config(), config(**raw)).restart


def test_authorities_of_clients_may_change_but_not_appear() -> None:
    def with_ca(name: str | None) -> Config:
        tls = {"cert_file": "c", "key_file": "k", "client_ca_file": name}
        extproc = {"ca_file": "ca", "cert_file": "c", "key_file": "k"}
        return config(server={"tls": tls}, envoy={"extproc": extproc})

    key = "server.tls.client_ca_file"
    assert compare(with_ca("a"), with_ca("b")) == Changes((key,), ())
    assert compare(with_ca("a"), with_ca(None)) == Changes((), (key,))
    assert compare(with_ca(None), with_ca("a")) == Changes((), (key,))


def test_models_are_compared_by_their_ids() -> None:
    one, two, other = {"id": "one"}, {"id": "two"}, {"id": "two", "policy": "random"}
    assert changes({"models": [one]}, {"models": [one, two]}).live == ("models",)
    assert changes({"models": [one, two]}, {"models": [two]}).live == ("models",)
    assert changes({"models": [one, two]}, {"models": [two, one]}).live == ("models",)
    assert changes({"models": [one, two]}, {"models": [one, other]}).live == ("models[1].policy",)
    assert changes({"models": [one, two]}, {"models": [other]}).live == (
        "models",
        "models[0].policy",
    )


def test_kv_events_of_a_model_are_compared_one_by_one() -> None:
    def with_events(*ports: int) -> dict[str, Any]:
        entries = [
            {"url": f"http://10.0.0.{n}:8000", "endpoint": f"tcp://*:{port}", "block_size": 16}
            for n, port in enumerate(ports, 1)
        ]
        model = {"id": "m", "policy": "min_ttft", "tokenizer_path": "t", "kv_events": entries}
        urls = discovery("http://10.0.0.1:8000", "http://10.0.0.2:8000")
        return raw_config(models=[model], discovery=urls)

    assert changes(with_events(1, 2), with_events(1, 3)).live == (
        "models[0].kv_events[1].endpoint",
    )
    assert changes(with_events(1), with_events(1, 3)).live == ("models[0].kv_events",)
    assert changes(with_events(), with_events(1)).live == ("models[0].kv_events",)


def test_workers_that_come_or_go_are_one_key() -> None:
    before, after = discovery("http://a:1"), discovery("http://b:1")
    assert changes({"discovery": before}, {"discovery": after}).live == (
        "discovery.static_urls.urls",
    )
