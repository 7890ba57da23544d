"""Merging this service into a configuration of Envoy: what changes, what stays, what is refused."""

import contextlib
import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from extproc.cli import main
from extproc.config.loading import load_config, parse_config
from extproc.config.schema import Config
from extproc.envoy_config import merge_yaml
from extproc.envoy_config.merge import merge_bootstrap
from extproc.errors import ConfigError
from tests.unit.configs import config

RECIPE = Path(__file__).parents[3] / "envoy" / "merge"
BEFORE = RECIPE / "before.yaml"
FILE = "file"
OURS = {
    "llm-extproc",
    "llm-extproc.strip",
    *(f"llm-extproc.decompressor.{name}" for name in ("gzip", "brotli", "zstd")),
}
Edit = Callable[[dict[str, Any]], object]


def before() -> dict[str, Any]:
    existing: dict[str, Any] = yaml.safe_load(BEFORE.read_text(encoding="utf-8"))
    return existing


def settings(**sections: Any) -> Config:
    sections["envoy"] = {"cluster": "llm_workers"} | sections.get("envoy", {})
    return config(**sections)


def merged(existing: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    return merge_bootstrap(settings(**sections), existing or before(), ["chat"])


def manager(bootstrap: dict[str, Any]) -> dict[str, Any]:
    listener = bootstrap["static_resources"]["listeners"][0]
    found: dict[str, Any] = listener["filter_chains"][0]["filters"][0]["typed_config"]
    return found


def hosts(bootstrap: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found = manager(bootstrap)["route_config"]["virtual_hosts"]
    return {one["name"]: one["routes"] for one in found}


def llm_routes(bootstrap: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {route["name"]: route for route in hosts(bootstrap)["llm"]}


def problems(*, routes: tuple[str, ...] = ("chat",), edit: Edit | None = None, **more: Any) -> str:
    existing = before()
    if edit is not None:
        edit(existing)
    with pytest.raises(ConfigError) as caught:
        merge_bootstrap(settings(**more), existing, routes)
    return "\n".join(caught.value.problems)


def test_the_shipped_file_is_what_its_parts_give() -> None:
    text = merge_yaml(load_config(RECIPE / "extproc.yaml"), BEFORE, ["chat"])
    assert (RECIPE / "envoy.yaml").read_text(encoding="utf-8") == text


def test_the_variant_of_the_page_is_merged_and_its_names_are_those_that_are_taken() -> None:
    page = (RECIPE / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    shipped = yaml.safe_load((RECIPE / "extproc.yaml").read_text(encoding="utf-8"))
    variant = merge_bootstrap(parse_config(shipped | yaml.safe_load(block)), before(), ["chat"])
    (row,) = [line for line in page.splitlines() if line.startswith("| a cluster is named")]
    named = set(re.findall(r"`([\w-]+)`", row.partition(", or a listener")[0]))
    added = set[str]()
    for new in (merged(), variant):
        resources = new["static_resources"]
        clusters = resources["clusters"][len(before()["static_resources"]["clusters"]) :]
        added |= {one["name"] for one in clusters} - {"llm_workers"}
        assert [one["name"] for one in resources["listeners"]] == ["main", "decode_pass"]
    assert added == named


def test_the_given_configuration_does_not_change() -> None:
    existing = before()
    merged(existing)
    assert existing == before()


def test_what_belongs_to_others_stays() -> None:
    old, new = before(), merged()
    assert hosts(new)["app"] == hosts(old)["app"]
    assert hosts(new)["llm"][0] == hosts(old)["llm"][0]
    assert new["admin"] == old["admin"]
    clusters = old["static_resources"]["clusters"]
    assert new["static_resources"]["clusters"][: len(clusters)] == clusters
    assert "overload_manager" not in new
    assert "dynamic_resources" not in new
    untouched = manager(old).keys() - {"http_filters", "route_config"}
    assert {name: manager(new)[name] for name in untouched} == {
        name: manager(old)[name] for name in untouched
    }


def test_filters_are_off_and_come_after_all_others_but_the_router() -> None:
    filters = manager(merged())["http_filters"]
    names = [one["name"] for one in filters]
    assert names[:2] == ["envoy.filters.http.jwt_authn", "envoy.filters.http.local_ratelimit"]
    assert set(names[2:-1]) == OURS
    # Bodies are decompressed before the service sees them, and headers are removed before both.
    assert names[2] == "llm-extproc.strip"
    assert names[-2:] == ["llm-extproc", "envoy.filters.http.router"]
    assert [one["name"] for one in filters if one.get("disabled")] == names[2:-1]


def test_only_the_named_routes_switch_the_filters_on() -> None:
    new = merged()
    for routes in hosts(new).values():
        for route in routes:
            on = OURS & set(route.get("typed_per_filter_config", {}))
            assert on == (OURS if route.get("name", "").startswith("chat") else set())


def test_every_route_made_of_one_keeps_its_match_and_its_authentication() -> None:
    (old,) = [route for route in hosts(before())["llm"] if route.get("name") == "chat"]
    routes = llm_routes(merged())
    assert list(routes) == ["docs", "chat-decode-pass", "chat-fail-open", "chat"]
    for name in ("chat-decode-pass", "chat-fail-open", "chat"):
        assert old["match"].items() <= routes[name]["match"].items()
        assert (
            old["typed_per_filter_config"].items()
            <= routes[name]["typed_per_filter_config"].items()
        )
        assert routes[name]["request_body_buffer_limit"] == 33_554_432 + 1_310_720
    assert routes["chat-fail-open"]["route"] == old["route"]
    assert routes["chat"]["route"]["timeout"] == "0s"
    assert routes["chat"]["route"]["cluster_header"] == "x-extproc-cluster"
    assert "cluster" not in routes["chat"]["route"]


def test_other_settings_of_the_route_are_kept_for_requests_with_a_decision() -> None:
    existing = before()
    route = hosts(existing)["llm"][1]
    route["route"] |= {"rate_limits": [{"stage": 1}], "max_stream_duration": {}}
    route["response_headers_to_remove"] = ["server"]
    route["match"]["headers"] = [{"name": "x-a", "present_match": True}]
    new = llm_routes(merged(existing))
    for name in ("chat-decode-pass", "chat"):
        assert new[name]["route"]["rate_limits"] == [{"stage": 1}]
        assert "max_stream_duration" not in new[name]["route"]
        assert "server" in new[name]["response_headers_to_remove"]
        assert new[name]["match"]["headers"][0] == {"name": "x-a", "present_match": True}


@pytest.mark.parametrize(
    "sections",
    [
        {"envoy": {"fail_open": False}},
        {"models": [{"id": "a"}, {"id": "b"}]},
        {"models": [{"id": "m", "pd": {"protocol": "nixl"}}]},
    ],
    ids=["closed", "two models", "pairs"],
)
def test_no_route_fails_open_where_only_the_service_can_choose(sections: dict[str, Any]) -> None:
    assert list(llm_routes(merged(**sections))) == ["docs", "chat-decode-pass", "chat"]


def test_without_a_second_pass_its_parts_are_left_out() -> None:
    new = merged(pd={"decode": "inline"})
    assert list(llm_routes(new)) == ["docs", "chat-fail-open", "chat"]
    assert "bootstrap_extensions" not in new
    assert len(new["static_resources"]["listeners"]) == 1
    assert [one["name"] for one in new["static_resources"]["clusters"]] == [
        *("app", "llm_pool", "llm_workers", "extproc")
    ]


def test_only_this_services_own_names_are_removed_before_the_route_is_chosen() -> None:
    existing = before()
    own = {"name": "theirs"}
    manager(existing)["early_header_mutation_extensions"] = [own]
    first, second = manager(merged(existing))["early_header_mutation_extensions"]
    assert first == own
    names = [one["remove"] for one in second["typed_config"]["mutations"]]
    assert "x-extproc-cluster" in names
    assert all(name.startswith(("x-extproc-", "x-gateway-destination-")) for name in names)


def test_windows_only_grow() -> None:
    existing = before()
    options = {"initial_stream_window_size": 65536, "initial_connection_window_size": 2**30}
    manager(existing)["http2_protocol_options"] = {"max_concurrent_streams": 7, **options}
    assert manager(merged(existing))["http2_protocol_options"] == {
        "max_concurrent_streams": 7,
        "initial_stream_window_size": 33_554_432 + 1_310_720,
        "initial_connection_window_size": 2**30,
    }


def test_replies_of_other_routes_stay() -> None:
    existing = before()
    theirs = {"filter": {"not_health_check_filter": {}}, "status_code": 599}
    manager(existing)["local_reply_config"] = {"mappers": [theirs], "body_format": {}}
    replies = manager(merged(existing))["local_reply_config"]
    assert replies["mappers"][-1] == theirs
    assert replies["body_format"] == {}
    for mapper in replies["mappers"][:-1]:
        (of_routes, _) = mapper["filter"]["and_filter"]["filters"]
        expression = of_routes["extension_filter"]["typed_config"]["expression"]
        assert expression == 'xds.route_name in ["chat-decode-pass", "chat-fail-open", "chat"]'


def test_several_routes_of_one_listener_share_the_filters() -> None:
    existing = before()
    second = copy.deepcopy(hosts(existing)["llm"][1]) | {"name": "native"}
    second["match"] = {"path": "/generate"}
    hosts(existing)["llm"].append(second)
    new = merge_bootstrap(settings(), existing, ["native", "chat"])
    assert len(manager(new)["http_filters"]) == 3 + len(OURS)
    assert list(llm_routes(new))[-3:] == ["native-decode-pass", "native-fail-open", "native"]


def test_routes_of_two_listeners_each_get_their_filters() -> None:
    existing = before()
    listeners = existing["static_resources"]["listeners"]
    untouched, second = copy.deepcopy(listeners[0]), copy.deepcopy(listeners[0])
    for name, one in (("untouched", untouched), ("second", second)):
        one["name"] = name
        hosts({"static_resources": {"listeners": [one]}})["llm"][1]["name"] = name
        listeners.append(one)
    new = merge_bootstrap(settings(), existing, ["chat", "second"])["static_resources"]["listeners"]
    assert [one["name"] for one in new] == ["main", "untouched", "second", "decode_pass"]
    assert new[1] == untouched
    for listener, name in ((new[0], "chat"), (new[2], "second")):
        of = {"static_resources": {"listeners": [listener]}}
        assert len(manager(of)["http_filters"]) == 3 + len(OURS)
        assert list(llm_routes(of))[1:] == [f"{name}-decode-pass", f"{name}-fail-open", name]


def test_listeners_that_share_their_routes_by_an_alias_are_both_extended() -> None:
    text = BEFORE.read_text(encoding="utf-8")
    text = text.replace("filter_chains:\n", "filter_chains: &chains\n", 1)
    second = "\n    - {name: second, address: *at, filter_chains: *chains}\n\n  clusters:"
    text = text.replace(
        "address:\n        socket_address", "address: &at\n        socket_address", 1
    )
    existing = yaml.safe_load(text.replace("\n\n  clusters:", second, 1))
    first, other, _ = merged(existing)["static_resources"]["listeners"]
    assert (first["name"], other["name"]) == ("main", "second")
    assert first["filter_chains"] == other["filter_chains"]
    of = {"static_resources": {"listeners": [other]}}
    assert len(manager(of)["http_filters"]) == 3 + len(OURS)
    assert list(llm_routes(of)) == ["docs", "chat-decode-pass", "chat-fail-open", "chat"]


def every_place(data: Any) -> Iterator[tuple[Any, Any]]:
    """Each value in plain data, as its parent and its key there."""
    pairs = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in pairs:
        yield data, key
        if isinstance(value, dict | list):
            yield from every_place(value)


PLACES = len(list(every_place(before())))


@given(
    place=st.integers(0, PLACES - 1),
    value=st.sampled_from([None, 5, "text", [], {}, [5], [None], {"name": 7}, True]),
    ads=st.booleans(),
)
def test_a_file_with_a_wrong_part_is_merged_or_refused(place: int, value: Any, ads: bool) -> None:
    existing = before()
    existing |= {"node": {}, "dynamic_resources": {}, "bootstrap_extensions": [{}]}
    parent, key = list(every_place(existing))[place]
    parent[key] = value
    envoy = {"endpoints": "ads"} if ads else {}
    with contextlib.suppress(ConfigError):
        merge_bootstrap(settings(envoy=envoy), existing, ["chat"])


def test_ads_is_added_where_it_is_missing() -> None:
    new = merged(envoy={"endpoints": "ads"})
    assert new["dynamic_resources"]["ads_config"]["grpc_services"]
    assert new["dynamic_resources"]["cds_config"]["ads"] == {}
    assert new["node"] == {"id": "llm-extproc", "cluster": "llm-extproc"}
    existing = before() | {"node": {"id": "edge-1", "metadata": {}}}
    node = merged(existing, envoy={"endpoints_file": "/run/e.json"})["node"]
    assert node == {"id": "edge-1", "cluster": "llm-extproc", "metadata": {}}
    names = {one["name"] for one in new["static_resources"]["clusters"]}
    assert "extproc-ads" in names
    assert "workers" not in names


@pytest.mark.parametrize("key", ["ads_config", "cds_config"])
def test_another_source_of_clusters_is_a_problem_with_ads(key: str) -> None:
    found = problems(
        envoy={"endpoints": "ads"}, edit=lambda old: old.update(dynamic_resources={key: 1})
    )
    assert found.startswith(f"envoy.endpoints: the file to merge into has {key} already")


def chat(existing: dict[str, Any]) -> dict[str, Any]:
    return hosts(existing)["llm"][1]


REFUSED: dict[str, tuple[Edit, str]] = {
    "no static resources": (lambda old: old.pop("static_resources"), "no static_resources"),
    "camel case": (
        lambda old: old.update(staticResources=old.pop("static_resources")),
        "snake_case",
    ),
    "no such name": (lambda old: chat(old).pop("name"), "--route chat: no route has this name"),
    "routes from elsewhere": (
        lambda old: manager(old).update(rds=manager(old).pop("route_config")),
        "RDS",
    ),
    "twice": (
        lambda old: hosts(old)["app"].append(chat(old)),
        "--route chat: several routes of one listener have this name",
    ),
    "no cluster": (
        lambda old: chat(old).update(redirect=chat(old).pop("route")),
        "--route chat: the route needs a `match`, and a `route`",
    ),
    "a rewritten path": (
        lambda old: chat(old)["route"].update(prefix_rewrite="/"),
        "--route chat: `prefix_rewrite` is not supported",
    ),
    "no router": (
        lambda old: manager(old)["http_filters"].pop(),
        "stat_prefix main is not envoy.filters.http.router",
    ),
    "our filter": (
        lambda old: manager(old)["http_filters"].insert(0, {"name": "llm-extproc"}),
        "llm-extproc already",
    ),
    "the workers' cluster": (
        lambda old: old["static_resources"]["clusters"][0].update(name="llm_workers"),
        "envoy.cluster: the file to merge into has a cluster of the name 'llm_workers'",
    ),
    "the service's cluster": (
        lambda old: old["static_resources"]["clusters"][0].update(name="extproc"),
        "a cluster 'extproc' already",
    ),
    "the second pass's listener": (
        lambda old: old["static_resources"]["listeners"][0].update(name="decode_pass"),
        "a listener 'decode_pass' already",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_refused_with_its_place(case: str) -> None:
    edit, expected = REFUSED[case]
    assert expected in problems(edit=edit)


@pytest.mark.parametrize("existing", [None, [], "text", {"static_resources": {"listeners": 1}}])
def test_a_file_of_another_form_is_refused(existing: object) -> None:
    with pytest.raises(ConfigError):
        merge_bootstrap(settings(), existing, ["chat"])


def test_all_problems_are_named_at_once() -> None:
    found = problems(routes=("chat", "none"), edit=REFUSED["our filter"][0]).splitlines()
    assert len(found) == 2
    assert "those with a name are docs, chat" in found[0]


def test_merging_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="merge into the file without the parts"):
        merge_bootstrap(settings(), merged(), ["chat"])


def run(folder: Path, *arguments: str) -> int:
    return main(["envoy-config", "--config", str(RECIPE / "extproc.yaml"), *arguments])


def test_the_command_prints_or_writes_the_merged_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "envoy.yaml"
    arguments = ["--merge-into", str(BEFORE), "--route", "chat"]
    assert run(tmp_path, *arguments, "--output", str(out)) == 0
    assert capsys.readouterr().out == ""
    assert run(tmp_path, *arguments) == 0
    assert capsys.readouterr().out == out.read_text() == (RECIPE / "envoy.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--route", "chat"], "--merge-into and --route are needed together"),
        (["--merge-into", str(BEFORE)], "--merge-into and --route are needed together"),
        (
            ["--merge-into", "/nowhere", "--route", "a"],
            "--merge-into: /nowhere: cannot be read: No such file",
        ),
        (["--merge-into", FILE, "--route", "a"], "line 2: the key 'a' is given twice"),
        (["--merge-into", str(BEFORE), "--route", "a"], "--route a: no route has this name"),
    ],
)
def test_the_command_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text("a: 1\na: 2\n")
    given = [str(file) if one == FILE else one for one in arguments]
    assert run(tmp_path, *given) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert expected in captured.err


@pytest.mark.parametrize("content", [b"\xff", b"a: [", b"a: &a [*a]"])
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    file = tmp_path / "existing.yaml"
    file.write_bytes(content)
    assert run(tmp_path, "--merge-into", str(file), "--route", "chat") == 2
    assert "--merge-into: " in capsys.readouterr().err


def test_json_is_read_as_well(tmp_path: Path) -> None:
    file = tmp_path / "existing.json"
    file.write_text(json.dumps(before()))
    text = merge_yaml(load_config(RECIPE / "extproc.yaml"), file, ["chat"])
    assert text == (RECIPE / "envoy.yaml").read_text()
