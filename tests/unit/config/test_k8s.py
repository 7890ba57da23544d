"""The section for workers in a Kubernetes cluster."""

from typing import Any

import pytest

from extproc.config.changes import compare
from tests.unit.configs import config, discovery, problem_of, problems_of, raw_config


def raw(backend: str = "k8s", **section: Any) -> dict[str, Any]:
    return raw_config(discovery={"backend": backend, backend: {"namespace": "ns"} | section})


@pytest.mark.parametrize(
    "section",
    [
        {"label_selector": "app=sglang"},
        {"label_selector": "app in (a, b), !canary", "namespace": ""},
        {"prefill_selector": "role=prefill", "decode_selector": "role=decode"},
        {"prefill_selector": "a=b", "decode_selector": "a==b,c"},
        {"label_selector": "a=", "port_name": "http", "port": 30000},
        {"label_selector": "a", "prefill_selector": "b", "decode_selector": "c"},
    ],
)
@pytest.mark.parametrize("backend", ["k8s", "k8s_pods"])
def test_a_section_of_sgl_router_and_more_is_accepted(
    section: dict[str, Any], backend: str
) -> None:
    assert config(**raw(backend, **section)).discovery.backend == backend


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({}, "label_selector"),
        ({"prefill_selector": "a=b"}, "decode_selector"),
        ({"decode_selector": "a=b"}, "prefill_selector"),
        ({"label_selector": "a=b", "prefill_selector": "c=d"}, "decode_selector"),
        # The same after the terms are put in order.
        ({"prefill_selector": "a=b,c=d", "decode_selector": "c == d, a == b"}, "decode_selector"),
        ({"label_selector": ""}, "label_selector"),
        ({"label_selector": "  "}, "label_selector"),
        ({"label_selector": "a in (b"}, "label_selector"),
        ({"label_selector": "a", "port": 0}, "port"),
        ({"label_selector": "a", "port_name": ""}, "port_name"),
        ({"label_selector": "a", "namespace": "Not_A_Name"}, "namespace"),
        ({"label_selector": "a", "namespace": "ns/x"}, "namespace"),
    ],
)
@pytest.mark.parametrize("backend", ["k8s", "k8s_pods"])
def test_a_wrong_section_is_refused_with_its_key(
    section: dict[str, Any], key: str, backend: str
) -> None:
    assert problem_of(raw(backend, **section)).startswith(f"discovery.{backend}.{key}: ")


def test_the_section_belongs_to_the_backend() -> None:
    assert problem_of(raw_config(discovery={"backend": "k8s"})).startswith("discovery.k8s: ")
    both = raw(label_selector="a")
    both["discovery"]["static_urls"] = {"urls": ["http://a"]}
    assert problem_of(both).startswith("discovery.static_urls: without effect")
    other = raw_config()
    other["discovery"]["k8s"] = {"namespace": "", "label_selector": "a"}
    assert problem_of(other).startswith("discovery.k8s: without effect")


def test_the_annotation_of_pods_can_be_another_one() -> None:
    found = config(**raw("k8s_pods", label_selector="a", bootstrap_port_annotation="x/y"))
    assert found.discovery.cluster is found.discovery.k8s_pods
    key = "discovery.k8s.bootstrap_port_annotation"
    assert problem_of(raw(label_selector="a", bootstrap_port_annotation="x")).startswith(key)


def test_the_namespace_is_required() -> None:
    missing = raw(label_selector="a")
    del missing["discovery"]["k8s"]["namespace"]
    assert "discovery.k8s.namespace: this key is required" in problems_of(missing)


def test_kv_events_cannot_name_single_workers() -> None:
    entry = {"url": "http://10.0.0.1:8000", "endpoint": "tcp://*:5557", "block_size": 16}
    model = {"id": "m", "policy": "min_ttft", "tokenizer_path": "t", "kv_events": [entry]}
    found = raw(label_selector="a") | {"models": [model]}
    assert problem_of(found).startswith("models[0].kv_events[0].url: only with the backend")


@pytest.mark.parametrize("prefill", [True, False])
def test_selectors_for_two_roles_make_a_disaggregated_configuration(prefill: bool) -> None:
    section = (
        {"prefill_selector": "a", "decode_selector": "b"} if prefill else {"label_selector": "a"}
    )
    assert config(**raw(**section)).is_disaggregated is prefill


def test_a_change_of_the_backend_needs_a_restart() -> None:
    changed = compare(config(discovery=discovery("http://a")), config(**raw(label_selector="a")))
    assert "discovery.backend" in changed.restart
    changed = compare(config(**raw(label_selector="a")), config(**raw(label_selector="b")))
    assert changed.restart == ("discovery.k8s.label_selector",)


def test_a_pool_needs_its_name_and_namespace() -> None:
    found = config(**raw("inference_pool", name="llama", prefill_selector="a", decode_selector="b"))
    assert found.is_disaggregated
    assert not config(**raw("inference_pool", name="llama")).is_disaggregated
    key = "discovery.inference_pool"
    assert problem_of(raw("inference_pool")) == f"{key}.name: this key is required"
    for wrong, name in (
        ({"namespace": ""}, "namespace"),
        ({"prefill_selector": "a"}, "decode_selector"),
        ({"prefill_selector": "a", "decode_selector": "a"}, "decode_selector"),
        ({"label_selector": "a"}, "label_selector"),
    ):
        problem = problem_of(raw("inference_pool", name="llama", **wrong))
        assert problem.startswith(f"{key}.{name}: ")
