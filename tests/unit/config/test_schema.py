"""Each key: its default, its type and bounds, and the problem of a bad value."""

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from extproc.config.loading import parse_config
from extproc.config.schema import Config
from extproc.errors import ConfigError
from tests.unit.configs import at, config, discovery, problem_of, problems_of, raw_config


def value_at(loaded: Config, path: str) -> object:
    value: Any = loaded
    for name in path.replace("models[0]", "models.0").split("."):
        value = value[0] if name == "0" else getattr(value, name)
    return value


@pytest.mark.parametrize(
    ("path", "default"),
    [
        # as in sgl-router, but for the addresses
        ("server.host", "127.0.0.1"),
        ("server.port", 9002),
        ("observability.log_level", "info"),
        ("observability.log_format", "text"),
        ("models[0].policy", "round_robin"),
        ("models[0].circuit_breaker.threshold", 3),
        ("models[0].circuit_breaker.cool_down_secs", 30),
        ("proxy.request_timeout_secs", 300),
        ("active_load.stale_request_timeout_secs", 600),
        # constants in sgl-router
        ("proxy.connect_timeout_secs", 5),
        ("discovery.introspection_retry_secs", 30),
        # keys that sgl-router does not have
        ("server.unix_socket", None),
        ("server.admin_host", "127.0.0.1"),
        ("server.admin_port", 9090),
        ("server.tls", None),
        ("envoy.host", "127.0.0.1"),
        ("envoy.port", 8080),
        ("envoy.admin_port", 9901),
        ("envoy.fail_open", True),
        ("envoy.destination", "list"),
        ("envoy.cluster_header", "x-extproc-cluster"),
        ("envoy.model_header", "x-extproc-model"),
        ("observability.debug_headers", False),
        ("load.release", "stream_end"),
        ("workers.api_key", None),
        ("workers.forward_api_key", False),
    ],
)
def test_a_key_that_is_left_out_has_its_default(path: str, default: object) -> None:
    assert value_at(config(models=[{"id": "m"}]), path) == default


def test_the_default_deadline_is_shorter_than_envoys() -> None:
    loaded = config()
    assert loaded.server.step_deadline_secs < loaded.envoy.message_timeout_secs


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("server.host", "::"),
        ("server.port", 1),
        ("server.port", 65535),
        ("server.drain_secs", 0),
        ("server.unix_socket", "/run/extproc.sock"),
        ("server.unix_socket", None),
        ("observability.log_level", "warn"),
        ("models[0].policy", "least_load"),
        ("models[0].circuit_breaker", {"threshold": 1, "cool_down_secs": 0}),
        ("proxy.request_timeout_secs", 1.5),
        ("proxy.fallback_workers", 0),
        ("active_load.stale_request_timeout_secs", 1),
        ("discovery.backend", "static_urls"),
        ("envoy.access_log", None),
        ("server.tls", None),
        ("workers.api_key", "secret"),
    ],
)
def test_a_good_value_is_accepted(path: str, value: object) -> None:
    loaded = value_at(parse_config(at(path, value)), path)
    if not isinstance(value, dict):
        assert loaded == value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("server.port", 0),
        ("server.port", 65536),
        ("server.port", -1),
        ("server.port", "9002"),
        ("server.port", 9002.5),
        ("server.port", True),
        ("server.port", None),
        ("server.port", [9002]),
        ("server.port", 10**400),
        ("server.host", ""),
        ("server.host", 5),
        ("server.host", None),
        ("server.drain_secs", -1),
        ("server.drain_secs", float("nan")),
        ("server.drain_secs", float("inf")),
        ("server.drain_secs", float("-inf")),
        ("server.drain_secs", 10**400),
        ("server.drain_secs", True),
        ("server.max_body_bytes", 0),
        ("server.step_deadline_secs", 0),
        ("server.tls", "yes"),
        ("server.tls", []),
        ("observability.debug_headers", "true"),
        ("observability.debug_headers", 1),
        ("observability.log_level", 5),
        ("observability.log_level", None),
        ("observability.log_level", ["info"]),
        ("observability.log_level", "INFO"),
        ("observability.log_format", "xml"),
        ("models[0].id", ""),
        ("models[0].id", None),
        ("models[0].id", 5),
        ("models[0].policy", "fastest"),
        ("models[0].policy", None),
        ("models[0].policy", {}),
        ("models[0].circuit_breaker.threshold", 0),
        ("models[0].circuit_breaker.threshold", 1.5),
        ("models[0].circuit_breaker.cool_down_secs", float("nan")),
        ("models[0].circuit_breaker", None),
        ("models[0].circuit_breaker", 3),
        ("proxy.request_timeout_secs", 0),
        ("proxy.request_timeout_secs", -1),
        ("proxy.request_timeout_secs", float("inf")),
        ("proxy.fallback_workers", 9),
        ("active_load.stale_request_timeout_secs", 0),
        ("load.release", "never"),
        ("discovery.backend", "consul"),
        ("discovery.static_urls", None),
        ("discovery.static_urls.urls", "http://a"),
        ("discovery.static_urls.urls", None),
        ("envoy.destination", "all"),
        ("envoy.extproc", None),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_bad_value_is_reported_with_its_key(path: str, value: object) -> None:
    problems = problems_of(at(path, value))
    assert {line.partition(": ")[0] for line in problems} == {path}
    assert all(len(line) < 300 for line in problems)


@pytest.mark.parametrize(
    ("path", "value", "allowed"),
    [
        (
            "models[0].policy",
            "foo",
            "round_robin, random, power_of_two, least_load, cache_aware_zmq, min_ttft",
        ),
        ("observability.log_level", "loud", "debug, info, warn, warning, error"),
        ("observability.log_format", "xml", "text, json"),
        ("discovery.backend", "consul", "static_urls, dns, k8s, k8s_pods, inference_pool"),
        ("load.release", "never", "stream_end, estimate"),
    ],
)
def test_the_problem_of_an_unknown_value_lists_the_allowed_ones(
    path: str, value: str, allowed: str
) -> None:
    assert (
        problem_of(at(path, value)) == f"{path}: unknown value {value!r}, expected one of {allowed}"
    )


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("sever", "server"),
        ("server.prot", "port"),
        ("server.tls.cert", "cert_file"),
        ("models[0].polcy", "policy"),
        ("models[0].circuit_breaker.treshold", "threshold"),
        ("discovery.static", "static_urls"),
        ("discovery.static_urls.url", "urls"),
        ("envoy.extproc.ca", "ca_file"),
    ],
)
def test_the_problem_of_an_unknown_key_lists_the_known_ones(path: str, allowed: str) -> None:
    problem = next(line for line in problems_of(at(path, 1)) if line.startswith(f"{path}: "))
    assert problem.startswith(f"{path}: unknown key, expected one of ")
    assert allowed in problem.partition("expected one of ")[2].split(", ")


@pytest.mark.parametrize("key", [5, None, True, 1.5, ("a", "b")])
def test_a_key_that_is_not_text_is_unknown(key: object) -> None:
    assert problem_of(raw_config() | {key: 1}).startswith(f"{key}: unknown key")


@pytest.mark.parametrize("key", ["models", "discovery"])
def test_a_missing_required_section_is_reported(key: str) -> None:
    raw = raw_config()
    del raw[key]
    assert problem_of(raw) == f"{key}: this key is required"


def test_a_missing_required_key_is_reported() -> None:
    assert problem_of(raw_config(models=[{}])).startswith("models[0].id: ")


@pytest.mark.parametrize(
    ("raw", "kind"),
    [(None, "null"), ([], "a list"), ("text", "text"), (5, "a number"), (True, "a boolean")],
)
@pytest.mark.parametrize("section", ["", "server", "discovery"])
def test_the_problem_of_a_section_that_is_not_a_mapping_says_what_it_is(
    raw: object, kind: str, section: str
) -> None:
    problem = problem_of(at(section, raw) if section else raw)
    assert problem == f"{section or 'the file'}: expected a mapping of keys, found {kind}"


def test_all_problems_are_reported_at_once() -> None:
    raw = {
        "server": {"port": 0, "prot": 1},
        "models": [{"id": "m", "policy": "foo"}, {"id": "m"}, {"id": "n", "policy": "min_ttft"}],
        "discovery": discovery("http://a", "ftp://b", "http://a:80/"),
        "proxy": {"request_timeout_secs": float("nan")},
        "nonsense": {},
        "envoy": {"port": 9090},
    }
    assert sorted(line.partition(": ")[0] for line in problems_of(raw)) == sorted(
        [
            "server.port",
            "server.prot",
            "models[0].policy",
            "models[1].id",
            "models[2].tokenizer_path",
            "discovery.static_urls.urls[1]",
            "discovery.static_urls.urls[2]",
            "proxy.request_timeout_secs",
            "nonsense",
            "envoy.port",
        ]
    )


@pytest.mark.parametrize(
    ("broken", "key"),
    [
        ({"models": None}, "models"),
        ({"models": [{"policy": "random"}]}, "models[0].id"),
        ({"discovery": discovery() | {"static_urls": {}}}, "discovery.static_urls.urls"),
        ({"discovery": {"static_urls": {"urls": ["http://a"]}}}, "discovery.backend"),
        ({"discovery": 5}, "discovery"),
    ],
)
def test_rules_are_checked_even_if_a_required_key_is_broken(
    broken: dict[str, Any], key: str
) -> None:
    raw = raw_config(server={"port": 8080}) | broken
    assert {line.partition(": ")[0] for line in problems_of(raw)} == {key, "envoy.port"}


_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=8)
    | st.dates()
    | st.binary(max_size=4)
)
_SURROGATES = st.text(st.characters(categories=("Cs", "Ll")), min_size=1, max_size=4)
_ANY: st.SearchStrategy[Any] = st.recursive(
    _LEAVES | _SURROGATES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)
_PATHS = st.sampled_from(
    [
        "models",
        "models[0].id",
        "models[0].circuit_breaker",
        "discovery",
        "discovery.static_urls",
        "discovery.static_urls.urls",
        "server",
        "server.host",
        "server.unix_socket",
        "server.tls",
        "envoy.cluster",
        "envoy.cluster_header",
        "envoy.extproc",
        "workers",
        "workers.api_key",
        "observability.log_level",
        "proxy.request_timeout_secs",
    ]
)


def refusals(raw: object) -> list[str]:
    """The problems of a document; a good document has an empty list."""
    try:
        parse_config(raw)
    except ConfigError as error:
        return error.problems or ["refused without a problem"]
    return []


@example("discovery.static_urls.urls", "\ud800")
@example("server.host", "\ud800")
@given(_PATHS, _ANY | _SURROGATES.map(lambda text: "/" + text) | _ANY.map(lambda value: [value]))
def test_no_value_raises_anything_but_a_config_error(path: str, value: object) -> None:
    assert all(": " in problem for problem in refusals(at(path, value)))


@given(_ANY | st.dictionaries(st.sampled_from(["models", "server", "discovery", "envoy"]), _ANY))
def test_no_document_raises_anything_but_a_config_error(raw: object) -> None:
    assert all(": " in problem for problem in refusals(raw))
