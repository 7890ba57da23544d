"""What a pod says about a worker: readiness, role, ports, addresses, and the pods of a group."""

import json
from typing import Any

import msgspec
import pytest

from extproc.config.schema import K8sPodsConfig
from extproc.discovery.pods import PodReader, WorkerPod, pod_reader
from extproc.discovery.worker_union import Reading

from .pod_json import pod_json

INDEX = "leaderworkerset.sigs.k8s.io/worker-index"
GROUP = "leaderworkerset.sigs.k8s.io/group-key"
PD = {"prefill_selector": "role in (prefill, both)", "decode_selector": "role notin (prefill)"}


def read(pod: dict[str, Any], **section: Any) -> Reading:
    reader = pod_reader(K8sPodsConfig(namespace="ns", **section))
    return reader.read(msgspec.json.decode(json.dumps(pod), type=WorkerPod))


def urls(pod: dict[str, Any], **section: Any) -> list[str]:
    return [str(one.spec.url) for one in read(pod, **section).sightings]


def test_a_ready_pod_is_a_worker_with_its_uid_and_port() -> None:
    (one,) = read(pod_json()).sightings
    assert (one.spec.id, str(one.spec.url), one.spec.role, one.draining) == (
        "u1:8000",
        "http://10.0.0.1:8000",
        "plain",
        False,
    )


@pytest.mark.parametrize(
    ("fields", "state"),
    [
        ({}, "in"),
        ({"conditions": [{"type": "Ready", "status": "False"}]}, "out"),
        ({"conditions": [{"type": "Ready", "status": "Unknown"}]}, "out"),
        ({"conditions": None}, "out"),
        ({"phase": "Pending"}, "out"),
        ({"phase": "Failed"}, "out"),
        ({"podIP": None, "podIPs": None}, "out"),
        ({"deletionTimestamp": "2026-01-01T00:00:00Z"}, "draining"),
        # An engine that stops may fail its probe while its streams end.
        ({"deletionTimestamp": "2026-01-01T00:00:00Z", "conditions": []}, "draining"),
        ({"deletionTimestamp": "2026-01-01T00:00:00Z", "phase": "Succeeded"}, "out"),
    ],
)
def test_readiness_and_deletion_say_whether_a_pod_is_a_worker(
    fields: dict[str, Any], state: str
) -> None:
    found = read(pod_json(**fields)).sightings
    states = ["draining" if one.draining else "in" for one in found]
    assert states == ([] if state == "out" else [state])


@pytest.mark.parametrize("ready", ["True", "False"])
def test_a_pod_that_is_deleted_serves_while_it_is_ready(ready: str) -> None:
    conditions = [{"type": "Ready", "status": ready}]
    (found,) = read(
        pod_json(deletionTimestamp="2026-01-01T00:00:00Z", conditions=conditions)
    ).sightings
    assert (found.draining, found.serving) == (True, ready == "True")


@pytest.mark.parametrize(
    ("role", "expected"),
    [("prefill", "prefill"), ("both", "prefill"), ("decode", "decode"), (None, "decode")],
)
def test_the_role_follows_the_labels_prefill_first(role: str | None, expected: str) -> None:
    labels = {} if role is None else {"role": role}
    (one,) = read(pod_json(labels), **PD).sightings
    assert one.spec.role == expected


def test_a_pod_of_no_role_is_no_worker() -> None:
    section = PD | {"decode_selector": "role=decode"}
    assert read(pod_json({"role": "other"}), **section) == Reading()


@pytest.mark.parametrize(
    ("text", "port", "problem"),
    [
        (None, None, None),
        ("8998", 8998, None),
        ("0", None, "bootstrap_port_invalid"),
        ("65536", None, "bootstrap_port_invalid"),
        ("http", None, "bootstrap_port_invalid"),
        ("", None, "bootstrap_port_invalid"),
        ("-1", None, "bootstrap_port_invalid"),
        ("9" * 5000, None, "bootstrap_port_invalid"),
    ],
)
def test_the_annotation_gives_the_bootstrap_port_of_a_prefill_pod(
    text: str | None, port: int | None, problem: str | None
) -> None:
    annotations = None if text is None else {"sglang.ai/bootstrap-port": text}
    reading = read(pod_json({"role": "prefill"}, annotations=annotations), **PD)
    assert [one.spec.bootstrap_port for one in reading.sightings] == ([] if problem else [port])
    assert reading.problem == problem
    # It says nothing about a pod of another role.
    assert read(pod_json(annotations=annotations)).problem is None


@pytest.mark.parametrize(
    ("labels", "found"),
    [({}, 1), ({INDEX: "0"}, 1), ({INDEX: "1"}, 0), ({INDEX: "10"}, 0)],
)
def test_only_the_leader_of_a_group_is_a_worker(labels: dict[str, str], found: int) -> None:
    assert len(read(pod_json(labels)).sightings) == found


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("v4_preferred", ["http://10.0.0.1:8000"]),
        ("v6_preferred", ["http://[fd00::1]:8000"]),
        ("v4_only", ["http://10.0.0.1:8000"]),
        ("v6_only", ["http://[fd00::1]:8000"]),
    ],
)
def test_a_pod_with_two_families_is_one_worker(family: str, expected: list[str]) -> None:
    both = [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]
    assert urls(pod_json(podIPs=both), address_family=family) == expected


def test_a_pod_without_an_address_of_the_only_family_is_no_worker() -> None:
    assert urls(pod_json(), address_family="v6_only") == []
    assert urls(pod_json(podIPs=None)) == ["http://10.0.0.1:8000"]


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({}, 9090),
        ({"port_name": "http"}, 8000),
        ({"port_name": "grpc"}, None),
        ({"port_name": "grpc", "port": 7000}, 7000),
        ({"port": 7000}, 7000),
    ],
)
def test_the_port_is_one_of_a_container(section: dict[str, Any], expected: int | None) -> None:
    containers = [
        {"name": "sidecar", "ports": [{"name": "metrics", "containerPort": 9090}]},
        {"name": "no-ports"},
        {"name": "engine", "ports": [{"name": "http", "containerPort": 8000, "protocol": "TCP"}]},
    ]
    reading = read(pod_json(spec={"containers": containers}), **section)
    assert [one.spec.url.port for one in reading.sightings] == ([expected] if expected else [])
    assert reading.problem == (None if expected else "port_not_found")


def test_a_pod_without_ports_has_the_engines_own() -> None:
    assert urls(pod_json(spec={"containers": [{"name": "engine"}]})) == ["http://10.0.0.1:30000"]


def test_a_bookmark_can_be_decoded() -> None:
    bookmark = {
        "kind": "Pod",
        "metadata": {"resourceVersion": "9", "creationTimestamp": None},
        "spec": {"containers": None},
        "status": {},
    }
    assert read(bookmark) == Reading()


def test_each_target_port_of_a_pool_is_a_worker() -> None:
    reader = PodReader(
        roles=[], family="v4_preferred", bootstrap_port_annotation="a", ports=(9001, 9002)
    )
    found = reader.read(msgspec.json.decode(json.dumps(pod_json()), type=WorkerPod)).sightings
    assert [one.spec.id for one in found] == ["u1:9001", "u1:9002"]
    assert [one.spec.url.port for one in found] == [9001, 9002]


@pytest.mark.parametrize(
    ("text", "ranks"),
    [
        ("0", [0]),
        ("4-7", [4, 5, 6, 7]),
        ("3-3", [3]),
        ("1023", [1023]),
        (None, []),
        ("7-4", None),
        ("1024", None),
        ("0-99999", None),
        ("4,5", None),
        ("-1", None),
        ("", None),
        ("\u0664", None),
    ],
)
def test_a_label_says_which_ranks_run_in_a_pod(text: str | None, ranks: list[int] | None) -> None:
    labels = {INDEX: "1", GROUP: "g"} | ({} if text is None else {"ranks": text})
    reading = read(pod_json(labels), ranks_from="ranks")
    assert reading.sightings == ()
    if ranks is None:
        assert reading == Reading(problem="ranks_invalid")
    else:
        assert reading == Reading(group="ns/g", rank_hosts=dict.fromkeys(ranks, "10.0.0.1"))


def test_the_ranks_of_a_pod_can_be_an_annotation_and_need_no_role() -> None:
    pod = pod_json({INDEX: "1", GROUP: "g"}, annotations={"ranks": "2"})
    assert read(pod, ranks_from="ranks", **PD).rank_hosts == {2: "10.0.0.1"}


@pytest.mark.parametrize("fields", [{"phase": "Failed"}, {"podIP": None, "podIPs": None}])
def test_a_pod_that_does_not_run_has_no_ranks(fields: dict[str, Any]) -> None:
    reading = read(pod_json({INDEX: "1", GROUP: "g"}, **fields), ranks_from=INDEX)
    assert reading == Reading(group="ns/g")


def test_without_the_key_or_a_group_nothing_is_said_about_ranks() -> None:
    assert read(pod_json({INDEX: "1", GROUP: "g"})) == Reading()
    assert read(pod_json({INDEX: "1"}), ranks_from=INDEX) == Reading()
    (leader,) = read(pod_json(), ranks_from=INDEX).sightings
    assert leader.spec.rank_hosts == ()
