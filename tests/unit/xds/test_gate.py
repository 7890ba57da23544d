"""A worker may be chosen when the Envoys know its address."""

import pytest

from extproc.xds.client import CLUSTERS_TYPE, ENDPOINTS_TYPE, Client, Snapshot
from extproc.xds.gate import Gate
from extproc.xds.session import DeltaSession, Request, Resource

NAME = "workers/m/plain"
CLUSTERS = {NAME: Resource("c", b"")}
ONE = {NAME: Resource("1", b"", frozenset({"10.0.0.1:80"}))}
TWO = {NAME: Resource("2", b"", frozenset({"10.0.0.1:80", "10.0.0.2:80"}))}
NONE_KNOWN = {NAME: frozenset[str]()}


def all_of(endpoints: dict[str, Resource]) -> dict[str, frozenset[str]]:
    return {name: found.addresses for name, found in endpoints.items()}


def acknowledged(endpoints: dict[str, Resource]) -> Client:
    client = Client(DeltaSession, Snapshot(CLUSTERS, endpoints))
    ((_, response),) = client.receive(ENDPOINTS_TYPE, Request(names=(NAME,)))
    client.receive(ENDPOINTS_TYPE, Request(nonce=response.nonce))
    return client


def test_without_an_envoy_a_worker_waits_for_a_moment() -> None:
    gate = Gate(0.5)
    assert gate.look(ONE, [], 10.0) == (NONE_KNOWN, 0.5)
    assert gate.look(ONE, [], 10.5) == (all_of(ONE), None)


def test_a_worker_waits_for_every_envoy() -> None:
    gate = Gate(0.5)
    clients = first, second = acknowledged(ONE), acknowledged(ONE)
    assert gate.look(ONE, clients, 0.0) == (NONE_KNOWN, 0.5)
    assert gate.look(ONE, clients, 0.5) == (all_of(ONE), None)
    sent = [one.update(Snapshot(CLUSTERS, TWO)) for one in clients]
    assert gate.look(TWO, clients, 1.0) == (all_of(ONE), 0.5)
    assert gate.look(TWO, clients, 2.0) == (all_of(ONE), None)
    for client, ((_, response),), expected in zip(clients, sent, (ONE, TWO), strict=True):
        client.receive(ENDPOINTS_TYPE, Request(nonce=response.nonce))
        assert gate.look(TWO, [first, second], 100.0)[0] == all_of(expected)


def test_an_envoy_that_connects_does_not_take_known_workers_away() -> None:
    gate, new = Gate(0.5), Client(DeltaSession, Snapshot(CLUSTERS, ONE))
    gate.look(ONE, [], 0.0)
    assert gate.look(ONE, [acknowledged(ONE)], 0.5) == (all_of(ONE), None)
    new.receive(ENDPOINTS_TYPE, Request(names=(NAME,)))
    assert gate.look(ONE, [new], 1.0) == (all_of(ONE), None)


def test_a_worker_that_comes_back_waits_again() -> None:
    gate, client = Gate(0.5), acknowledged(TWO)
    gate.look(TWO, [client], 0.0)
    assert gate.look(TWO, [client], 0.5) == (all_of(TWO), None)
    assert gate.look(ONE, [client], 1.0) == (all_of(ONE), None)
    # The Envoy uses it still, but one with a stream to another replica may not.
    assert gate.look(TWO, [client], 2.0) == (all_of(ONE), 0.5)
    assert gate.look(TWO, [client], 2.5) == (all_of(TWO), None)


@pytest.mark.parametrize("other", ["other", "*"])
def test_a_stream_for_something_else_counts_only_if_it_asks_for_all(other: str) -> None:
    gate, client = Gate(0.5), Client(DeltaSession, None)
    client.receive(ENDPOINTS_TYPE, Request(names=(other,)))
    gate.look(ONE, [client], 0.0)
    expected = NONE_KNOWN if other == "*" else all_of(ONE)
    assert gate.look(ONE, [client], 0.5) == (expected, None)


def test_an_envoy_that_has_its_clusters_from_here_counts_before_it_asks_for_the_endpoints() -> None:
    gate, client = Gate(0.5), Client(DeltaSession, Snapshot(CLUSTERS, ONE))
    ((kind, clusters),) = client.receive(CLUSTERS_TYPE, Request())
    assert (kind, clusters.resources) == (CLUSTERS_TYPE, CLUSTERS)
    gate.look(ONE, [client], 0.0)
    assert gate.look(ONE, [client], 1.0)[0] == NONE_KNOWN
    ((_, endpoints),) = client.receive(ENDPOINTS_TYPE, Request(names=(NAME,)))
    client.receive(ENDPOINTS_TYPE, Request(nonce=endpoints.nonce))
    # Endpoints of a cluster that it may have rejected.
    assert gate.look(ONE, [client], 1.0)[0] == NONE_KNOWN
    client.receive(CLUSTERS_TYPE, Request(nonce=clusters.nonce))
    assert gate.look(ONE, [client], 1.0)[0] == all_of(ONE)


def test_an_address_is_known_in_one_cluster_and_not_yet_in_another() -> None:
    both = ONE | {"workers/n/plain": ONE[NAME]}
    gate = Gate(0.5)
    gate.look(ONE, [], 0.0)
    assert gate.look(both, [], 0.5) == (
        NONE_KNOWN | all_of(ONE) | {"workers/n/plain": frozenset()},
        0.5,
    )
