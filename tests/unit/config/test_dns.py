"""The section for host names whose every address is a worker."""

from typing import Any

import pytest

from extproc.config.changes import compare
from extproc.config.worker_urls import parse_nameserver
from extproc.envoy_config import bootstrap_problems, render_bootstrap, render_yaml
from extproc.errors import ConfigError
from tests.unit.configs import config, discovery, problem_of, raw_config

URL = "http://workers.ns.svc:8000"


def raw(*urls: str, **section: Any) -> dict[str, Any]:
    return raw_config(discovery={"backend": "dns", "dns": {"urls": list(urls or [URL])} | section})


def test_lists_by_role_are_those_of_the_static_section() -> None:
    other = "http://decode:8000/"
    found = config(**raw(URL, other, prefill_urls=[URL], decode_urls=["http://decode:8000"]))
    assert found.is_disaggregated
    assert found.discovery.lookup_family == "v4_preferred"
    assert not config(**raw()).is_disaggregated


@pytest.mark.parametrize(
    ("urls", "section", "key", "text"),
    [
        (["http://workers.ns.svc"], {}, "urls[0]", "the port is missing, write http://workers"),
        (["http://workers.ns.svc/"], {}, "urls[0]", "the port is missing"),
        ([URL, "http://10.0.0.1:8000"], {}, "urls[1]", "this is an address"),
        (["http://[::1]:8000"], {}, "urls[0]", "this is an address"),
        (["https://workers:8000"], {}, "urls[0]", "https is not possible"),
        (["http://localhost:9002"], {}, "urls[0]", "this is server.port"),
        (["workers:8000"], {}, "urls[0]", "the scheme must be"),
        ([URL, URL + "/"], {}, "urls[1]", "the same worker as discovery.dns.urls[0]"),
        ([URL], {"prefill_urls": ["http://x:1"]}, "prefill_urls[0]", "not one of discovery.dns"),
        (
            [URL],
            {"prefill_urls": [URL], "decode_urls": [URL]},
            "decode_urls[0]",
            "the same worker as",
        ),
        ([URL], {"ttl_min_secs": 31}, "ttl_min_secs", "must not be more than ttl_max_secs (30)"),
        ([URL], {"nameservers": ["ns.example"]}, "nameservers[0]", "expected an IP address"),
        ([URL], {"nameservers": ["::1:53"] * 2 + [""]}, "nameservers[2]", "expected an IP"),
        ([URL], {"leave_secs": -1}, "leave_secs", "expected"),
        ([URL], {"address_family": "v4"}, "address_family", "unknown value 'v4'"),
        ([URL], {"names": []}, "names", "unknown key"),
    ],
)
def test_a_wrong_section_is_refused_with_its_key(
    urls: list[str], section: dict[str, Any], key: str, text: str
) -> None:
    key_of, _, sentence = problem_of(raw(*urls, **section)).partition(": ")
    assert key_of == f"discovery.dns.{key}"
    assert sentence.startswith(text)


def test_without_a_name_there_is_nothing_to_look_up() -> None:
    empty = raw()
    empty["discovery"]["dns"]["urls"] = []
    assert problem_of(empty) == "discovery.dns.urls: at least one worker URL is needed"
    assert problem_of(raw_config(discovery={"backend": "dns"})).startswith("discovery.dns: this")


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("10.0.0.10", ("10.0.0.10", 53)),
        ("10.0.0.10:5353", ("10.0.0.10", 5353)),
        ("::1", ("::1", 53)),
        ("[::1]:5353", ("::1", 5353)),
    ],
)
def test_a_name_server_is_an_address_with_or_without_a_port(
    text: str, parsed: tuple[str, int]
) -> None:
    assert parse_nameserver(text) == parsed


@pytest.mark.parametrize(
    "text",
    ["", "dns", "dns:53", "10.0.0.1:", "10.0.0.1:0", "10.0.0.1:65536", "[10.0.0.1]:53", ":53"],
)
def test_anything_else_is_not_a_name_server(text: str) -> None:
    with pytest.raises(ValueError, match="expected an IP address"):
        parse_nameserver(text)


def test_a_change_of_the_names_needs_a_restart() -> None:
    assert compare(config(**raw()), config(**raw("http://b:1"))).restart == ("discovery.dns.urls",)
    changed = compare(config(discovery=discovery("http://a")), config(**raw()))
    assert "discovery.backend" in changed.restart


def test_envoys_file_is_refused_without_a_way_to_tell_envoy_the_addresses() -> None:
    without = config(**raw())
    assert list(bootstrap_problems(without)) == []
    with pytest.raises(ConfigError) as caught:
        render_yaml(without)
    (problem,) = caught.value.problems
    assert problem.startswith("envoy.endpoints: ads is needed, or envoy.endpoints_file")
    assert "'dns'" in problem
    for envoy in ({"endpoints": "ads"}, {"endpoints_file": "/run/workers.json"}):
        assert render_yaml(config(**raw(), envoy=envoy))


@pytest.mark.parametrize("servers", [[], ["10.0.0.10", "[::1]:5353"]])
def test_without_the_service_envoy_resolves_the_same_names_at_the_same_servers(
    servers: list[str],
) -> None:
    section = raw("http://a:8000", "http://b:8001", nameservers=servers, address_family="v6_only")
    rendered = render_bootstrap(config(**section, envoy={"endpoints": "ads"}))
    clusters = {one["name"]: one for one in rendered["static_resources"]["clusters"]}
    pool = clusters["workers-fail-open"]
    entries = pool["load_assignment"]["endpoints"][0]["lb_endpoints"]
    sockets = [one["endpoint"]["address"]["socket_address"] for one in entries]
    assert [(one["address"], one["port_value"]) for one in sockets] == [("a", 8000), ("b", 8001)]
    dns = pool["cluster_type"]["typed_config"]
    assert dns["dns_lookup_family"] == "V6_ONLY"
    if not servers:
        assert "typed_dns_resolver_config" not in dns
        return
    found = dns["typed_dns_resolver_config"]["typed_config"]["resolvers"]
    asked = [one["socket_address"] for one in found]
    assert [(one["address"], one["port_value"]) for one in asked] == [
        ("10.0.0.10", 53),
        ("::1", 5353),
    ]
