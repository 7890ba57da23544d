"""The rendered bootstrap: stripped headers, routes that fail open, limits, workers and logs."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from extproc.config.loading import load_config, parse_config
from extproc.config.schema import Config
from extproc.envoy_config import render_bootstrap, render_yaml
from extproc.errors import ConfigError
from extproc.serving import stream_settings
from tests.unit.configs import raw_config

ROOT = Path(__file__).parents[2]
MEBIBYTE = 1024 * 1024


def config(*urls: str, models: int = 1, **sections: dict[str, Any]) -> Config:
    """A checked configuration; sections are merged over one or more round-robin models."""
    return parse_config(
        {
            "models": [{"id": f"model-{number}"} for number in range(models)],
            "discovery": {
                "backend": "static_urls",
                "static_urls": {"urls": list(urls) or ["http://10.0.0.1:8000"]},
            },
            **sections,
        }
    )


def listener(rendered: dict[str, Any]) -> dict[str, Any]:
    found, _ = rendered["static_resources"]["listeners"]
    assert isinstance(found, dict)
    return found


def manager(rendered: dict[str, Any]) -> dict[str, Any]:
    (chain,) = listener(rendered)["filter_chains"]
    (found,) = chain["filters"]
    typed = found["typed_config"]
    assert isinstance(typed, dict)
    return typed


def ext_proc(rendered: dict[str, Any]) -> dict[str, Any]:
    found = manager(rendered)["http_filters"][-2]["typed_config"]
    assert isinstance(found, dict)
    return found


def second_ext_proc(rendered: dict[str, Any]) -> dict[str, Any]:
    (_, second) = rendered["static_resources"]["listeners"]
    manager = second["filter_chains"][0]["filters"][0]["typed_config"]
    found = manager["http_filters"][-2]["typed_config"]
    assert isinstance(found, dict)
    return found


def routes(rendered: dict[str, Any]) -> dict[str, dict[str, Any]]:
    (host,) = manager(rendered)["route_config"]["virtual_hosts"]
    return {route["name"]: route for route in host["routes"]}


def cluster(rendered: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [c for c in rendered["static_resources"]["clusters"] if c["name"] == name]
    assert isinstance(found, dict)
    return found


def stripped(rendered: dict[str, Any]) -> set[str]:
    (extension,) = manager(rendered)["early_header_mutation_extensions"]
    mutations = extension["typed_config"]["mutations"]
    return {mutation["remove"] for mutation in mutations if "remove" in mutation}


def http_options(found: dict[str, Any]) -> dict[str, Any]:
    (options,) = found["typed_extension_protocol_options"].values()
    assert isinstance(options, dict)
    return options


class TestStrippedHeaders:
    def test_every_control_header_in_our_sources_is_stripped(self) -> None:
        names: set[str] = set()
        for path in (ROOT / "extproc").rglob("*.py"):
            if "_protos" not in path.parts and "simulator" not in path.parts:
                text = path.read_text(encoding="utf-8")
                names |= set(re.findall(r'"(x-(?:extproc|envoy|gateway)-[a-z-]*[a-z])"', text))
        assert "x-gateway-destination-endpoint" in names
        assert names <= stripped(render_bootstrap(config()))

    @given(
        cluster_header=st.from_regex(r"x-a[a-z0-9-]{1,60}", fullmatch=True),
        model_header=st.from_regex(r"x-b[a-z0-9-]{1,60}", fullmatch=True),
    )
    def test_configured_names_are_stripped_both_ways(
        self, cluster_header: str, model_header: str
    ) -> None:
        names = {"cluster_header": cluster_header, "model_header": model_header}
        rendered = render_bootstrap(config(envoy=names))
        assert set(names.values()) <= stripped(rendered)
        removed = manager(rendered)["route_config"]["response_headers_to_remove"]
        assert set(names.values()) <= set(removed)
        assert routes(rendered)["decided"]["route"]["cluster_header"] == cluster_header
        (match,) = routes(rendered)["decided"]["match"]["headers"]
        assert match == {"name": cluster_header, "present_match": True}

    @pytest.mark.parametrize(
        "name",
        [
            "x-envoy-max-retries",
            "x-envoy-upstream-rq-timeout-ms",
            "x-envoy-upstream-rq-per-try-timeout-ms",
            "x-envoy-retry-on",
            "x-envoy-retry-grpc-on",
            "x-envoy-hedge-on-per-try-timeout",
            "x-envoy-retriable-status-codes",
            "x-envoy-retriable-header-names",
            "x-envoy-original-dst-host",
            "x-envoy-upstream-alt-stat-name",
            "x-envoy-expected-rq-timeout-ms",
            "x-envoy-decorator-operation",
            "x-envoy-attempt-count",
            "x-envoy-force-trace",
            "x-gateway-destination-endpoint-subset",
            "x-gateway-destination-endpoint-served",
            "x-extproc-pass",
        ],
    )
    def test_headers_that_control_envoy_are_stripped(self, name: str) -> None:
        assert name in stripped(render_bootstrap(config()))

    @pytest.mark.parametrize("enabled", [False, True])
    def test_the_debug_header_passes_only_where_it_is_enabled(self, enabled: bool) -> None:
        rendered = render_bootstrap(config(observability={"debug_headers": enabled}))
        assert ("x-extproc-debug" in stripped(rendered)) is not enabled

    def test_workers_cannot_send_debug_headers(self) -> None:
        removed = manager(render_bootstrap(config()))["route_config"]["response_headers_to_remove"]
        assert {"x-extproc-worker", "x-gateway-destination-endpoint-served"} <= set(removed)


class TestFailingOpen:
    def test_one_model_fails_open_on_inference_paths_only(self) -> None:
        found = routes(render_bootstrap(config()))
        assert list(found) == [
            "decode_pass",
            "decided",
            "fail_open",
            "messages_unavailable",
            "unavailable",
        ]
        assert found["fail_open"]["route"]["cluster"] == "workers"
        paths = re.compile(found["fail_open"]["match"]["safe_regex"]["regex"])
        assert paths.fullmatch("/v1/chat/completions")
        assert paths.fullmatch("/v1/models")
        for path in ("/flush_cache", "/abort_request", "/v1/chat/completions/", "/v1xmodels"):
            assert not paths.fullmatch(path)

    @pytest.mark.parametrize(("models", "fail_open"), [(1, False), (2, True), (2, False)])
    def test_otherwise_a_request_without_a_decision_gets_503(
        self, models: int, fail_open: bool
    ) -> None:
        rendered = render_bootstrap(config(models=models, envoy={"fail_open": fail_open}))
        found = routes(rendered)
        assert list(found) == ["decode_pass", "decided", "messages_unavailable", "unavailable"]
        last = found["unavailable"]
        assert last["direct_response"]["status"] == 503
        error = last["direct_response"]["body_format"]["json_format"]["error"]
        assert error["code"] == "router_unavailable"
        assert error["type"] == "server_error"
        headers = {
            h["header"]["key"]: h["header"]["value"] for h in last["response_headers_to_add"]
        }
        assert headers == {"x-router-error-code": "router_unavailable", "retry-after": "1"}

    @pytest.mark.parametrize("fail_open", [False, True])
    def test_the_filter_itself_never_cuts_open_responses(self, fail_open: bool) -> None:
        rendered = render_bootstrap(config(envoy={"fail_open": fail_open}))
        assert ext_proc(rendered)["failure_mode_allow"] is True

    def test_the_service_is_probed_every_second_with_or_without_traffic(self) -> None:
        found = cluster(render_bootstrap(config()), "extproc")
        (check,) = found["health_checks"]
        assert check["grpc_health_check"] == {}
        for name in ("interval", "no_traffic_interval", "no_traffic_healthy_interval"):
            assert check[name] == "1s"
        assert check["healthy_threshold"] == 1
        assert found["common_lb_config"]["healthy_panic_threshold"] == {"value": 0}


class TestLocalReplies:
    def test_every_503_says_when_to_retry(self) -> None:
        seen = set()
        for found in render_bootstrap(config())["static_resources"]["listeners"]:
            (chain,) = found["filter_chains"]
            for mapper in chain["filters"][0]["typed_config"]["local_reply_config"]["mappers"]:
                headers = {
                    one["header"]["key"]: one["header"]["value"] for one in mapper["headers_to_add"]
                }
                assert ("retry-after" in headers) is (mapper.get("status_code") == 503)
                seen.add(mapper.get("status_code"))
        assert seen == {None, 408, 413, 503, 504}

    def test_no_503_is_left_to_the_mapper_of_other_errors(self) -> None:
        replies = manager(render_bootstrap(config()))["local_reply_config"]["mappers"]
        assert "response.code == 503" in str(replies[-3]["filter"])
        assert "response.code >= 500" in str(replies[-1]["filter"])

    def test_each_mapper_comes_first_for_the_anthropic_api(self) -> None:
        replies = manager(render_bootstrap(config()))["local_reply_config"]["mappers"]
        for anthropic, other in zip(replies[::2], replies[1::2], strict=True):
            assert anthropic["filter"]["and_filter"]["filters"][1] == other["filter"]
            shape = anthropic["body_format_override"]["json_format"]
            assert set(shape) == {"type", "error", "request_id"}
            error = other["body_format_override"]["json_format"]["error"]
            assert shape["error"]["code"] == error["code"]


class TestTimeouts:
    def test_responses_end_by_silence_only(self) -> None:
        rendered = render_bootstrap(config(envoy={"stream_idle_timeout_secs": 700.5}))
        assert manager(rendered)["stream_idle_timeout"] == "700.5s"
        for name in ("decided", "fail_open"):
            action = routes(rendered)[name]["route"]
            assert action["timeout"] == "0s"
            assert action["idle_timeout"] == "700.5s"
            assert "max_stream_duration" not in action
        assert "max_stream_duration" not in manager(rendered)["common_http_protocol_options"]

    def test_requests_must_arrive_in_time(self) -> None:
        found = manager(render_bootstrap(config(proxy={"request_timeout_secs": 42})))
        assert found["request_timeout"] == "42s"
        assert found["request_headers_timeout"] == "30s"

    def test_a_hung_service_is_noticed_soon_and_one_at_work_may_ask_for_more(self) -> None:
        envoy = {"message_timeout_secs": 7, "hang_timeout_secs": 3}
        found = ext_proc(render_bootstrap(config(envoy=envoy)))
        assert found["message_timeout"] == "3s"
        assert found["max_message_timeout"] == "7s"

    @pytest.mark.parametrize(
        ("hang", "first", "second"),
        [(2, "2s", "0.8s"), (1, "1s", "0.5s"), (0.2, "0.2s", "0.2s"), (30, "10s", "10s")],
    )
    def test_a_pair_waits_less_for_a_hung_service_in_its_second_pass(
        self, hang: float, first: str, second: str
    ) -> None:
        """2 s and 0.8 s by default: no client waits for more than 3 s."""
        rendered = render_bootstrap(config(envoy={"hang_timeout_secs": hang}))
        assert ext_proc(rendered)["message_timeout"] == first
        assert second_ext_proc(rendered)["message_timeout"] == second

    @pytest.mark.parametrize("hang", [0.2, 2, 10, 30])
    @pytest.mark.parametrize("protocol", ["sglang", "nixl"])
    def test_envoy_never_gives_up_before_the_service_does(self, hang: float, protocol: str) -> None:
        """With NIXL a decision includes the prefill."""
        models = [{"id": "m", "pd": {"protocol": protocol}}]
        made = parse_config(raw_config(models=models, envoy={"hang_timeout_secs": hang}))
        found = ext_proc(render_bootstrap(made))
        at_most = float(found["max_message_timeout"].removesuffix("s"))
        second = second_ext_proc(render_bootstrap(made))
        waits = min(float(one["message_timeout"].removesuffix("s")) for one in (found, second))
        extension = stream_settings(made).extension
        if extension is None:
            assert waits > made.routing_deadline_secs
        else:
            assert extension.after_seconds < waits
            assert made.routing_deadline_secs < extension.message_timeout_seconds <= at_most

    def test_only_what_never_reached_a_worker_is_retried(self) -> None:
        found = routes(render_bootstrap(config()))
        for name, retries in (("decided", 0), ("fail_open", 1)):
            policy = found[name]["route"]["retry_policy"]
            assert policy["retry_on"] == "connect-failure,refused-stream,reset-before-request"
            assert policy["num_retries"] == retries


class TestBodies:
    @pytest.mark.parametrize("models", [1, 2])
    def test_a_body_of_the_allowed_size_fits_while_it_waits(self, models: int) -> None:
        # At the listener: a direct_response route, met before the decision, ignores the limit
        # of its virtual host.
        rendered = render_bootstrap(config(models=models, server={"max_body_bytes": 8 * MEBIBYTE}))
        limit = 8 * MEBIBYTE + 1280 * 1024
        assert listener(rendered)["per_connection_buffer_limit_bytes"] == limit
        # Over HTTP/2 a stream's window is a second limit.
        http2 = manager(rendered)["http2_protocol_options"]
        assert http2["initial_stream_window_size"] == limit
        assert http2["initial_connection_window_size"] >= limit

    def test_bodies_are_decompressed_before_the_service_and_responses_never(self) -> None:
        *found, last, _ = manager(render_bootstrap(config()))["http_filters"]
        assert last["name"] == "envoy.filters.http.ext_proc"
        assert [one["name"].rpartition(".")[2] for one in found] == ["gzip", "brotli", "zstd"]
        for one in found:
            directions = one["typed_config"]
            assert directions["request_direction_config"] == {"advertise_accept_encoding": False}
            responses = directions["response_direction_config"]["common_config"]["enabled"]
            assert responses["default_value"] is False

    def test_bodies_of_responses_are_not_sent_to_the_service(self) -> None:
        mode = ext_proc(render_bootstrap(config()))["processing_mode"]
        assert mode["request_body_mode"] == "BUFFERED"
        assert mode["response_body_mode"] == "NONE"
        assert mode["response_trailer_mode"] == "SEND"


class TestWorkers:
    def test_addresses_are_static_and_names_are_resolved_as_often_as_by_the_service(self) -> None:
        static = cluster(render_bootstrap(config("http://10.0.0.1:1", "http://[::1]:2")), "workers")
        assert static["type"] == "STATIC"
        discovery = {
            "backend": "static_urls",
            "static_urls": {"urls": ["http://worker-0:1"], "dns_ttl_secs": 5},
        }
        named = cluster(render_bootstrap(config(discovery=discovery)), "workers")
        dns = named["cluster_type"]["typed_config"]
        assert dns["dns_refresh_rate"] == "5s"
        assert dns["dns_lookup_family"] == "V4_PREFERRED"
        assert dns["all_addresses_in_single_endpoint"] is False

    @pytest.mark.parametrize(
        ("family", "in_envoy"),
        [
            ("v4_preferred", "V4_PREFERRED"),
            ("v6_preferred", "AUTO"),
            ("v4_only", "V4_ONLY"),
            ("v6_only", "V6_ONLY"),
        ],
    )
    def test_names_are_resolved_in_the_family_of_the_service(
        self, family: str, in_envoy: str
    ) -> None:
        discovery = {
            "backend": "static_urls",
            "static_urls": {"urls": ["http://worker-0:1"], "dns_lookup_family": family},
        }
        named = cluster(render_bootstrap(config(discovery=discovery)), "workers")
        assert named["cluster_type"]["typed_config"]["dns_lookup_family"] == in_envoy

    def test_the_attempts_of_a_request_are_reported(self) -> None:
        attributes = ext_proc(render_bootstrap(config()))["response_attributes"]
        assert "upstream.request_attempt_count" in attributes

    def test_the_destination_is_read_from_metadata_before_the_header(self) -> None:
        (policy,) = cluster(render_bootstrap(config()), "workers")["load_balancing_policy"][
            "policies"
        ]
        sources = policy["typed_extension_config"]["typed_config"]["override_host_sources"]
        assert sources == [
            {"metadata": {"key": "envoy.lb", "path": [{"key": "x-gateway-destination-endpoint"}]}},
            {"header": "x-gateway-destination-endpoint"},
        ]

    def test_idle_connections_close_before_the_engine_closes_them(self) -> None:
        options = http_options(cluster(render_bootstrap(config()), "workers"))
        assert options["common_http_protocol_options"]["idle_timeout"] == "3s"

    def test_the_cluster_has_the_configured_name(self) -> None:
        rendered = render_bootstrap(config(envoy={"cluster": "outbound|80||w"}))
        assert cluster(rendered, "outbound|80||w")
        assert routes(rendered)["fail_open"]["route"]["cluster"] == "outbound|80||w"

    def test_https_is_verified_by_name_or_by_address(self) -> None:
        rendered = render_bootstrap(
            config(
                "https://worker-0:1",
                "https://worker-1:1",
                "https://10.0.0.1:1",
                "http://10.0.0.2:1",
                workers={"ca_file": "/ca.pem"},
            )
        )
        found = cluster(rendered, "workers")
        contexts = {
            match["name"]: match["transport_socket"]["typed_config"]
            for match in found["transport_socket_matches"]
        }
        assert set(contexts) == {"tls", "tls-10.0.0.1"}
        assert contexts["tls"]["auto_host_sni"] is True
        assert contexts["tls"]["auto_sni_san_validation"] is True
        by_address = contexts["tls-10.0.0.1"]["common_tls_context"]["validation_context"]
        assert by_address["match_typed_subject_alt_names"] == [
            {"san_type": "IP_ADDRESS", "matcher": {"exact": "10.0.0.1"}}
        ]
        for context in contexts.values():
            validation = context["common_tls_context"]["validation_context"]
            assert validation["trusted_ca"] == {"filename": "/ca.pem"}
        endpoints = found["load_assignment"]["endpoints"][0]["lb_endpoints"]
        chosen = [
            endpoint.get("metadata", {})
            .get("filter_metadata", {})
            .get("envoy.transport_socket_match", {})
            .get("tls")
            for endpoint in endpoints
        ]
        assert chosen == ["tls", "tls", "tls-10.0.0.1", None]

    @pytest.mark.parametrize("name", ["workers", "extproc"])
    def test_long_requests_meet_no_circuit_breaker(self, name: str) -> None:
        rendered = render_bootstrap(config(proxy={"retry_busy": False}))
        (threshold,) = cluster(rendered, name)["circuit_breakers"]["thresholds"]
        limits = {key: value for key, value in threshold.items() if key != "priority"}
        assert set(limits) == {
            "max_connections",
            "max_pending_requests",
            "max_requests",
            "max_retries",
        }
        assert min(limits.values()) == 1_000_000_000

    @pytest.mark.parametrize(("workers", "percent"), [(1, 50), (2, 50), (3, 34), (5, 20), (9, 20)])
    def test_retries_are_a_fifth_of_the_requests_in_flight_or_the_share_of_one_worker(
        self, workers: int, percent: int
    ) -> None:
        urls = [f"http://10.0.0.{n}:1" for n in range(workers)]
        rendered = cluster(render_bootstrap(config(*urls)), "workers")
        (threshold,) = rendered["circuit_breakers"]["thresholds"]
        assert threshold["retry_budget"]["budget_percent"] == {"value": percent}
        assert threshold["retry_budget"]["min_retry_concurrency"] == 5
        assert "max_retries" not in threshold

    def test_only_busy_answers_of_attempts_are_reported(self) -> None:
        def http_filters(**sections: Any) -> list[dict[str, Any]]:
            found = cluster(render_bootstrap(config(**sections)), "workers")
            (options,) = found["typed_extension_protocol_options"].values()
            filters: list[dict[str, Any]] = options.get("http_filters", [])
            return filters

        assert http_filters(proxy={"retry_busy": False}) == []
        reporter, codec = http_filters()
        assert codec["name"] == "envoy.filters.http.upstream_codec"
        settings = reporter["typed_config"]["extension_config"]["typed_config"]
        assert settings["processing_mode"]["request_header_mode"] == "SKIP"
        assert settings["failure_mode_allow"]
        skipped = reporter["typed_config"]["xds_matcher"]["matcher_list"]["matchers"][0]
        statuses = skipped["predicate"]["not_matcher"]["or_matcher"]["predicate"]
        values = [one["single_predicate"]["value_match"]["exact"] for one in statuses]
        assert values == ["429", "503"]


class TestTheServiceItself:
    @pytest.mark.parametrize(
        ("server", "endpoint", "address"),
        [
            ({"host": "10.1.1.1"}, {}, "10.1.1.1"),
            ({"host": "0.0.0.0"}, {}, "127.0.0.1"),
            ({"host": "::"}, {}, "127.0.0.1"),
            ({"host": "0.0.0.0"}, {"host": "router.example"}, "router.example"),
        ],
    )
    def test_the_address_of_the_service(
        self, server: dict[str, Any], endpoint: dict[str, Any], address: str
    ) -> None:
        found = cluster(
            render_bootstrap(config(server=server, envoy={"extproc": endpoint})), "extproc"
        )
        (lb_endpoint,) = found["load_assignment"]["endpoints"][0]["lb_endpoints"]
        socket = lb_endpoint["endpoint"]["address"]["socket_address"]
        assert socket == {"address": address, "port_value": 9002}

    def test_the_unix_socket_is_preferred(self) -> None:
        found = cluster(
            render_bootstrap(config(server={"unix_socket": "/run/extproc.sock"})), "extproc"
        )
        (lb_endpoint,) = found["load_assignment"]["endpoints"][0]["lb_endpoints"]
        assert lb_endpoint["endpoint"]["address"] == {"pipe": {"path": "/run/extproc.sock"}}


class TestLogs:
    def test_neither_prompts_nor_credentials_nor_queries_are_logged(self) -> None:
        (logger,) = manager(render_bootstrap(config()))["access_log"]
        fields = logger["typed_config"]["log_format"]["json_format"]
        assert fields["path"] == "%PATH(NQ)%"
        assert not any("AUTHORIZATION" in value.upper() for value in fields.values())

    def test_null_switches_the_access_log_off(self) -> None:
        assert manager(render_bootstrap(config(envoy={"access_log": None})))["access_log"] == []


class TestProblems:
    @pytest.mark.parametrize(
        ("sections", "key"),
        [
            ({"envoy": {"host": "localhost"}}, "envoy.host"),
            ({"envoy": {"message_timeout_secs": 3601}}, "envoy.message_timeout_secs"),
            ({"envoy": {"cluster": "extproc"}}, "envoy.cluster"),
            ({"envoy": {"extproc": {"ca_file": "/ca.pem"}}}, "envoy.extproc.ca_file"),
        ],
    )
    def test_a_value_that_envoy_cannot_run_with_is_refused_by_its_key(
        self, sections: dict[str, Any], key: str
    ) -> None:
        with pytest.raises(ConfigError) as caught:
            render_bootstrap(config(**sections))
        (problem,) = caught.value.problems
        assert problem.startswith(f"{key}: ")

    def test_all_problems_are_named_at_once(self) -> None:
        with pytest.raises(ConfigError) as caught:
            render_yaml(
                config("http://10.0.0.1:1", envoy={"host": "localhost", "cluster": "extproc"})
            )
        keys = [problem.partition(": ")[0] for problem in caught.value.problems]
        assert keys == ["envoy.host", "envoy.cluster"]


class TestYaml:
    def test_the_text_is_the_bootstrap_without_anchors(self) -> None:
        text = render_yaml(config("http://10.0.0.1:1", "http://10.0.0.2:1"))
        assert text.startswith("# ")
        assert yaml.safe_load(text) == render_bootstrap(
            config("http://10.0.0.1:1", "http://10.0.0.2:1")
        )
        assert "&id" not in text

    @pytest.mark.parametrize("name", ["ads", "pd", "standalone"])
    def test_the_shipped_file_is_what_its_configuration_renders(self, name: str) -> None:
        folder = ROOT / "envoy" / name
        rendered = render_yaml(load_config(folder / "extproc.yaml"))
        assert (folder / "envoy.yaml").read_text(encoding="utf-8") == rendered


def test_workers_of_a_cluster_need_the_file_of_endpoints() -> None:
    section = {"namespace": "ns", "label_selector": "app=sglang"}
    sections: dict[str, Any] = {"discovery": {"backend": "k8s", "k8s": section}}
    with pytest.raises(ConfigError, match=r"envoy\.endpoints: ads is needed, or "):
        render_bootstrap(config(**sections))
    rendered = render_bootstrap(config(**sections, envoy={"endpoints_file": "/run/e.json"}))
    assert rendered["static_resources"]["clusters"][0]["type"] == "EDS"
    rendered = render_bootstrap(config(**sections, envoy={"endpoints": "ads"}))
    assert rendered["dynamic_resources"]["cds_config"]["ads"] == {}


@pytest.mark.parametrize("host", [None, "workers.ns.svc:30000"])
def test_a_cluster_of_pods_fails_open_to_its_host_or_to_the_workers_that_envoy_has(
    host: str | None,
) -> None:
    section = {"namespace": "ns", "label_selector": "app=sglang"}
    rendered = render_bootstrap(
        config(
            discovery={"backend": "k8s", "k8s": section},
            envoy={"endpoints": "ads", "fail_open_host": host},
        )
    )
    resources = rendered["static_resources"]
    (manager,) = resources["listeners"][0]["filter_chains"][0]["filters"]
    routes = manager["typed_config"]["route_config"]
    (open_route,) = (
        one for one in routes["virtual_hosts"][0]["routes"] if one["name"] == "fail_open"
    )
    cluster = open_route["route"]["cluster"]
    in_file = cluster in {one["name"] for one in resources["clusters"]}
    assert (cluster, in_file) == (
        ("workers/model-0/plain", False) if host is None else ("workers-fail-open", True)
    )
    # Envoy refuses a route to a cluster that it does not know, unless this is off.
    assert routes.get("validate_clusters", True) is in_file
