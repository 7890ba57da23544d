"""Rules that span keys or need more than a type."""

from typing import Any

import pytest

from extproc.config.loading import parse_config
from extproc.config.schema import Config
from tests.unit.configs import URL, at, config, discovery, problem_of, problems_of, raw_config

SOCKET_PATH_MAX = 107


def urls(*given: str) -> dict[str, Any]:
    return raw_config(discovery=discovery(*given))


def models(*ids: str) -> dict[str, Any]:
    return raw_config(models=[{"id": each} for each in ids])


def queued(**queue: Any) -> dict[str, Any]:
    return raw_config(models=[{"id": "m", "queue": queue}])


def kv_model(*entries: dict[str, Any], policy: str = "min_ttft") -> dict[str, Any]:
    """One model with these entries in `kv_events`, and one worker."""
    given = [{"endpoint": "tcp://*:5557", "block_size": 16} | entry for entry in entries]
    model = {"id": "m", "policy": policy, "tokenizer_path": "/models/m", "kv_events": given}
    return raw_config(models=[model])


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        (raw_config(models=[{"id": "m", "policy": "min_ttft"}]), "models[0].tokenizer_path"),
        (raw_config(models=[{"id": "m", "policy": "cache_aware_zmq"}]), "models[0].tokenizer_path"),
        (kv_model({}, policy="random"), "models[0].kv_events"),
        (kv_model({}, {}), "models[0].kv_events[1].url"),
        (kv_model({"url": URL}, {"url": f"{URL}/"}), "models[0].kv_events[1].url"),
        (kv_model({"url": "http://10.9.9.9:1"}), "models[0].kv_events[0].url"),
        (kv_model({"url": "not a url"}), "models[0].kv_events[0].url"),
        (kv_model({"endpoint": "ipc:///tmp/a"}), "models[0].kv_events[0].endpoint"),
        (kv_model({"endpoint": "tcp://*"}), "models[0].kv_events[0].endpoint"),
        (kv_model({"endpoint": "tcp://*:0"}), "models[0].kv_events[0].endpoint"),
        (kv_model({"endpoint": "tcp://*:65535", "dp_size": 2}), "models[0].kv_events[0].endpoint"),
        (
            kv_model({"replay_endpoint": "tcp://*:65535", "dp_size": 2}),
            "models[0].kv_events[0].replay_endpoint",
        ),
        (queued(max_requests=1, max_wait_secs=5), "models[0].queue.max_wait_secs"),
        (queued(tenant_header="X-Tenant"), "models[0].queue.tenant_header"),
        (queued(priority_header="x-request-id"), "models[0].queue.priority_header"),
        (queued(priority_header=":path"), "models[0].queue.priority_header"),
        (
            queued(priority_classes=["normal", "normal"]),
            "models[0].queue.priority_classes",
        ),
        (queued(default_class="none"), "models[0].queue.default_class"),
        (raw_config(models=[]), "models"),
        (models("m", "m"), "models[1].id"),
        (models("m", "n", "m"), "models[2].id"),
        (models(" "), "models[0].id"),
        (models(" m"), "models[0].id"),
        (models("m\t"), "models[0].id"),
        (models("モデル"), "models[0].id"),
        (models("a\nb"), "models[0].id"),
        (models("a\x7fb"), "models[0].id"),
        (raw_config(discovery={"backend": "static_urls"}), "discovery.static_urls"),
        (urls(), "discovery.static_urls.urls"),
        (urls(""), "discovery.static_urls.urls[0]"),
        (urls("http://a", "   "), "discovery.static_urls.urls[1]"),
        (urls("grpc://a"), "discovery.static_urls.urls[0]"),
        (urls("http://a/v1"), "discovery.static_urls.urls[0]"),
        (urls("http://a", "http://a/"), "discovery.static_urls.urls[1]"),
        (urls("http://a:80", " http://A "), "discovery.static_urls.urls[1]"),
        (urls("http://[::1]:1", "http://[0::1]:1"), "discovery.static_urls.urls[1]"),
        (at("server.port", 9090), "server.admin_port"),
        (at("envoy.port", 9002), "envoy.port"),
        (at("envoy.admin_port", 8080), "envoy.admin_port"),
        (at("server.step_deadline_secs", 10), "server.step_deadline_secs"),
        (at("envoy.message_timeout_secs", 5), "server.step_deadline_secs"),
        (at("envoy.message_timeout_secs", 1), "server.step_deadline_secs"),
        (at("envoy.stream_idle_timeout_secs", 300), "envoy.stream_idle_timeout_secs"),
        (at("proxy.request_timeout_secs", 700), "envoy.stream_idle_timeout_secs"),
        (at("proxy.fallback_workers", 3), "proxy.fallback_workers"),
        (at("server.max_body_bytes", 300 * 1024 * 1024), "server.max_buffered_bytes"),
        (at("envoy.cluster_header", "X-Cluster"), "envoy.cluster_header"),
        (at("envoy.cluster_header", ":path"), "envoy.cluster_header"),
        (at("envoy.cluster_header", "authorization"), "envoy.cluster_header"),
        (at("envoy.cluster_header", "x-envoy-max-retries"), "envoy.cluster_header"),
        (at("envoy.model_header", "x-a\nb"), "envoy.model_header"),
        (at("envoy.model_header", "x-request-id"), "envoy.model_header"),
        (at("envoy.model_header", "x-extproc-cluster"), "envoy.model_header"),
        (at("envoy.cluster", "a b"), "envoy.cluster"),
        (at("envoy.endpoints", "file"), "envoy.endpoints_file"),
        (
            raw_config(envoy={"endpoints": "ads", "endpoints_file": "/run/a.json"}),
            "envoy.endpoints_file",
        ),
        (at("envoy.fail_open_host", "workers:80"), "envoy.fail_open_host"),
        (raw_config(envoy={"endpoints": "ads", "fail_open_host": "w"}), "envoy.fail_open_host"),
        (at("envoy.cluster", "a\n"), "envoy.cluster"),
        (at("workers.api_key", ""), "workers.api_key"),
        (at("workers.api_key", "a b"), "workers.api_key"),
        (at("workers.api_key", "a\r\nx-y: z"), "workers.api_key"),
        (at("workers.forward_api_key", True), "workers.forward_api_key"),
        (
            raw_config(workers={"api_key": "a", "api_key_file": "/f"}),
            "workers.api_key_file",
        ),
        (at("server.unix_socket", "relative.sock"), "server.unix_socket"),
        (at("server.unix_socket", ""), "server.unix_socket"),
        (at("server.unix_socket", "/" + "x" * SOCKET_PATH_MAX), "server.unix_socket"),
        (at("server.unix_socket", "/" + "é" * 54), "server.unix_socket"),
        (at("server.unix_socket", "/\ud800"), "server.unix_socket"),
        (
            raw_config(server={"tls": {"cert_file": "/c", "key_file": "/k"}}),
            "envoy.extproc.ca_file",
        ),
        (
            raw_config(
                server={"tls": {"cert_file": "/c", "key_file": "/k", "client_ca_file": "/a"}},
                envoy={"extproc": {"ca_file": "/a"}},
            ),
            "envoy.extproc.cert_file",
        ),
        (raw_config(envoy={"extproc": {"cert_file": "/c"}}), "envoy.extproc.key_file"),
        (raw_config(envoy={"extproc": {"key_file": "/k"}}), "envoy.extproc.key_file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_rule_is_reported_with_its_key(raw: dict[str, Any], key: str) -> None:
    assert {line.partition(": ")[0] for line in problems_of(raw)} == {key}


@pytest.mark.parametrize(
    "raw",
    [
        models("m", "M", "org/m", "m:lora"),
        urls("http://a", "https://a", "http://a:81", "http://b/"),
        at("server.step_deadline_secs", 9.999),
        at("server.unix_socket", "/" + "x" * (SOCKET_PATH_MAX - 1)),
        raw_config(workers={"api_key": "a", "forward_api_key": True}),
        raw_config(workers={"api_key_file": "/f", "forward_api_key": True}),
        raw_config(
            server={"tls": {"cert_file": "/c", "key_file": "/k"}},
            envoy={"extproc": {"ca_file": "/a"}},
        ),
        raw_config(
            server={"tls": {"cert_file": "/c", "key_file": "/k"}, "unix_socket": "/s"},
        ),
        at("envoy.stream_idle_timeout_secs", 300.1),
    ],
)
def test_a_configuration_within_the_rules_is_accepted(raw: dict[str, Any]) -> None:
    assert isinstance(parse_config(raw), Config)


def test_the_problem_of_a_duplicate_names_the_first() -> None:
    assert "discovery.static_urls.urls[0]" in problem_of(urls("http://a", "http://b", "http://a/"))
    assert "models[0]" in problem_of(models("m", "n", "m"))


def test_a_worker_given_three_times_has_two_problems() -> None:
    assert len(problems_of(urls("http://a", "http://a/", "http://a:80"))) == 2


def test_a_problem_does_not_repeat_a_secret() -> None:
    for raw in (
        at("workers.api_key", "hunter2 x"),
        at("workers.api_key", ["hunter2"]),
        urls("http://user:hunter2@a"),
    ):
        assert "hunter2" not in problem_of(raw)


def test_a_loaded_configuration_is_immutable() -> None:
    loaded: Any = config()
    with pytest.raises(AttributeError):
        loaded.server.port = 1


def test_each_worker_may_have_its_own_kv_events_entry() -> None:
    parsed = parse_config(
        kv_model({}, {"url": URL, "endpoint": "tcp://10.0.0.9:7000", "topic": "kv"})
    )
    assert [entry.url for entry in parsed.models[0].kv_events] == [None, URL]


@pytest.mark.parametrize("missing", ["block_size", "endpoint"])
def test_a_kv_events_entry_without_a_required_key_is_reported(missing: str) -> None:
    raw = kv_model({})
    del raw["models"][0]["kv_events"][0][missing]
    assert f"models[0].kv_events[0].{missing}: this key is required" in problems_of(raw)


@pytest.mark.parametrize("listens", ["127.0.0.1", "0.0.0.0", "::", "::1"])
@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.1.2.3", "0.0.0.0", "[::]", "[::1]", "[0:0::1]"),
        *("[::ffff:127.0.0.1]", "[::ffff:0.0.0.0]", "localhost", "LOCALHOST", "localhost."),
    ],
)
def test_no_spelling_of_an_own_address_is_accepted(listens: str, host: str) -> None:
    raw = urls(f"http://{host}:9777") | {"server": {"host": listens, "port": 9777}}
    assert "this is server.port" in problem_of(raw)


def test_the_same_port_at_another_host_is_accepted() -> None:
    raw = urls("http://10.0.0.1:9777", "http://[2001:db8::1]:9777", "http://name:9777")
    parse_config(raw | {"server": {"port": 9777}})


def test_a_model_whose_tokens_come_from_its_engines_needs_no_tokenizer() -> None:
    model = {"id": "m", "policy": "min_ttft", "tokens_from": "engine"}
    assert parse_config(raw_config(models=[model])).models[0].tokenizer_path is None
