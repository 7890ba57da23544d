"""What an EndpointSlice says about workers: ports, families, conditions, identity, roles."""

from typing import Any

import pytest

from extproc.config.schema import DnsLookupFamily
from extproc.discovery.endpoint_slices import SliceReader
from extproc.label_selectors import parse_selector

from .slices import endpoint, slice_of

DUAL = {"addressType": "IPv6"}
HTTP = {"name": "http", "port": 8000, "protocol": "TCP"}
METRICS = {"name": "metrics", "port": 9090, "protocol": "TCP"}


def reader(
    port_name: str | None = None,
    port: int | None = None,
    family: DnsLookupFamily = "v4_preferred",
) -> SliceReader:
    return SliceReader(roles=[], port_name=port_name, port=port, family=family)


def urls(found: Any, by: SliceReader | None = None) -> list[str]:
    return [str(one.spec.url) for one in (by or reader()).read(found).sightings]


def test_each_endpoint_is_a_worker_with_the_uid_of_its_pod_and_its_port() -> None:
    reading = reader().read(slice_of(endpoint("10.0.0.1", "a"), endpoint("10.0.0.2", "b")))
    assert [(one.spec.id, str(one.spec.url), one.spec.role) for one in reading.sightings] == [
        ("a:8000", "http://10.0.0.1:8000", "plain"),
        ("b:8000", "http://10.0.0.2:8000", "plain"),
    ]
    assert reading.problem is None


def test_an_endpoint_without_a_pod_is_known_by_its_address_and_not_by_its_slice() -> None:
    ids = {
        reader().read(slice_of(endpoint("10.0.0.1", None), name=name)).sightings[0].spec.id
        for name in ("slice-1", "slice-2")
    }
    assert ids == {"ns/http://10.0.0.1:8000"}


@pytest.mark.parametrize(
    ("ports", "port_name", "port", "found"),
    [
        ([METRICS, HTTP], "http", None, 8000),
        ([METRICS, HTTP], "http", 7000, 8000),  # the name counts first
        ([METRICS], "http", 7000, 7000),
        ([METRICS], "http", None, None),
        ([METRICS, HTTP], None, 7000, 7000),
        ([METRICS, HTTP], None, None, 9090),
        ([HTTP | {"protocol": "UDP"}, METRICS], None, None, 9090),
        ([HTTP | {"protocol": None}], None, None, 8000),
        ([{"name": "http", "port": None}], None, None, 30000),
        ([], None, None, 30000),
        (None, None, None, 30000),
        (None, "http", None, None),
        (None, "http", 7000, 7000),
    ],
)
def test_the_port_is_found_by_name_then_by_number(
    ports: Any, port_name: str | None, port: int | None, found: int | None
) -> None:
    reading = reader(port_name, port).read(slice_of(endpoint(), ports=ports))
    assert [one.spec.url.port for one in reading.sightings] == ([found] if found else [])
    assert reading.problem == (None if found else "port_not_found")


def test_a_slice_without_pods_has_no_ports_and_is_no_problem() -> None:
    reading = reader("http", None).read(slice_of(endpoints=None, ports=None))
    assert (reading.problem, reading.sightings, reading.shared) == (None, (), True)


@pytest.mark.parametrize("nothing", [None, []])
def test_a_slice_without_endpoints_names_no_worker(nothing: Any) -> None:
    assert urls(slice_of(endpoints=nothing)) == []


@pytest.mark.parametrize(
    ("conditions", "state"),
    [
        (None, "in"),
        ({}, "in"),
        ({"ready": None}, "in"),
        ({"ready": True, "serving": True, "terminating": False}, "in"),
        ({"ready": False}, "out"),
        ({"ready": False, "serving": False, "terminating": False}, "out"),
        ({"ready": False, "serving": True, "terminating": True}, "draining"),
        ({"ready": False, "terminating": True}, "draining"),
        ({"ready": False, "serving": False, "terminating": True}, "out"),
        # A Service that publishes addresses that are not ready.
        ({"ready": True, "serving": True, "terminating": True}, "draining"),
        ({"ready": True, "serving": False, "terminating": False}, "in"),
    ],
)
def test_the_conditions_say_whether_an_endpoint_is_a_worker(conditions: Any, state: str) -> None:
    reading = reader().read(slice_of(endpoint(conditions=conditions)))
    states = ["draining" if one.draining else "in" for one in reading.sightings]
    assert states == ([] if state == "out" else [state])


@pytest.mark.parametrize(
    ("family", "found"),
    [("v4_preferred", 1), ("v6_preferred", 1), ("v4_only", 0), ("v6_only", 1)],
)
def test_ipv6_addresses_are_written_in_brackets(family: DnsLookupFamily, found: int) -> None:
    by = reader(family=family)
    assert urls(slice_of(endpoint("fd00::1"), **DUAL), by) == ["http://[fd00::1]:8000"] * found


def test_the_preferred_family_of_a_pod_with_two_comes_first() -> None:
    by = reader(family="v6_preferred")
    (four,) = by.read(slice_of(endpoint("10.0.0.1"))).sightings
    (six,) = by.read(slice_of(endpoint("fd00::1"), **DUAL)).sightings
    assert four.spec.id == six.spec.id
    assert six.rank < four.rank


def test_slices_of_host_names_are_refused() -> None:
    reading = reader().read(slice_of(endpoint("worker.example"), addressType="FQDN"))
    assert (list(reading.sightings), reading.problem) == ([], "fqdn_addresses")


def test_only_the_first_address_of_an_endpoint_is_used() -> None:
    several = endpoint() | {"addresses": ["10.0.0.1", "10.0.0.9"]}
    assert urls(slice_of(several)) == ["http://10.0.0.1:8000"]


def test_roles_follow_the_labels_of_the_slice_prefill_first() -> None:
    by = SliceReader(
        roles=[("prefill", parse_selector("role=p")), ("decode", parse_selector("app=sglang"))],
        port_name=None,
        port=None,
        family="v4_preferred",
    )
    roles = [
        [one.spec.role for one in by.read(slice_of(endpoint(), labels=labels)).sightings]
        for labels in ({"role": "p", "app": "sglang"}, {"app": "sglang"}, {"app": "other"}, None)
    ]
    assert roles == [["prefill"], ["decode"], [], []]


def test_a_slice_of_no_role_is_not_reported_as_a_problem() -> None:
    by = SliceReader(
        roles=[("prefill", parse_selector("role=p"))],
        port_name="http",
        port=None,
        family="v4_preferred",
    )
    assert by.read(slice_of(endpoint("x.example"), addressType="FQDN")).problem is None
