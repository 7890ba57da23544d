"""Clusters and endpoints of one stream, in the order in which Envoy needs them."""

import pytest

from extproc.xds.client import CLUSTERS_TYPE, ENDPOINTS_TYPE, Client, Outgoing, Snapshot
from extproc.xds.session import DeltaSession, Request, Resource, Session, StateSession

FORMS = pytest.mark.parametrize("form", [StateSession, DeltaSession])
OLD, NEW = Resource("c1", b""), Resource("c2", b"")
SAME = Resource("e1", b"", frozenset({"10.0.0.1:80"}))
BEFORE, AFTER = Snapshot({"a": OLD}, {"a": SAME}), Snapshot({"a": NEW}, {"a": SAME})


def names(form: type[Session]) -> tuple[str, ...]:
    """What an acknowledgement of endpoints repeats."""
    return ("a",) if form is StateSession else ()


def told(sent: list[Outgoing]) -> list[tuple[str, dict[str, Resource]]]:
    return [(kind, dict(response.resources)) for kind, response in sent]


def connected(form: type[Session]) -> Client:
    """A client that has acknowledged everything of `BEFORE`."""
    client = Client(form, BEFORE)
    ((_, clusters),) = client.receive(CLUSTERS_TYPE, Request())
    client.receive(CLUSTERS_TYPE, Request(nonce=clusters.nonce))
    ((_, endpoints),) = client.receive(ENDPOINTS_TYPE, Request(names=("a",)))
    client.receive(ENDPOINTS_TYPE, Request(names=names(form), nonce=endpoints.nonce))
    assert client.has("a", "10.0.0.1:80")
    return client


@FORMS
def test_the_endpoints_of_a_changed_cluster_follow_it(form: type[Session]) -> None:
    client = connected(form)
    assert client.update(BEFORE) == []
    sent = client.update(AFTER)
    assert told(sent) == [(CLUSTERS_TYPE, {"a": NEW}), (ENDPOINTS_TYPE, {"a": SAME})]
    assert client.update(AFTER) == []


@FORMS
def test_clusters_go_before_endpoints(form: type[Session]) -> None:
    other = Resource("e2", b"")
    sent = connected(form).update(Snapshot({"a": NEW}, {"a": other}))
    assert [kind for kind, _ in sent] == [CLUSTERS_TYPE, ENDPOINTS_TYPE]
    client = Client(form, None)
    client.receive(ENDPOINTS_TYPE, Request(names=("a",)))
    client.receive(CLUSTERS_TYPE, Request())
    assert [kind for kind, _ in client.update(AFTER)] == [CLUSTERS_TYPE, ENDPOINTS_TYPE]


@FORMS
def test_they_follow_although_an_update_of_them_was_on_its_way(form: type[Session]) -> None:
    client, other = connected(form), Resource("e2", b"")
    ((_, response),) = client.update(Snapshot({"a": OLD}, {"a": other}))
    assert told(client.update(Snapshot({"a": NEW}, {"a": other}))) == [(CLUSTERS_TYPE, {"a": NEW})]
    answer = Request(names=names(form), nonce=response.nonce)
    assert told(client.receive(ENDPOINTS_TYPE, answer)) == [(ENDPOINTS_TYPE, {"a": other})]


def test_a_client_that_connects_again_gets_the_endpoints_of_a_changed_cluster() -> None:
    client = Client(DeltaSession, AFTER)
    sent = client.receive(CLUSTERS_TYPE, Request(known_versions={"a": "c1"}))
    assert told(sent) == [(CLUSTERS_TYPE, {"a": NEW})]
    sent = client.receive(ENDPOINTS_TYPE, Request(names=("a",), known_versions={"a": "e1"}))
    assert told(sent) == [(ENDPOINTS_TYPE, {"a": SAME})]


def test_a_client_that_connects_again_and_has_everything_is_sent_nothing() -> None:
    client = Client(DeltaSession, BEFORE)
    assert client.receive(CLUSTERS_TYPE, Request(known_versions={"a": "c1"})) == []
    assert client.receive(ENDPOINTS_TYPE, Request(names=("a",), known_versions={"a": "e1"})) == []
    assert client.has("a", "10.0.0.1:80")


@FORMS
def test_an_answer_about_one_type_says_nothing_about_the_other(form: type[Session]) -> None:
    client = Client(form, BEFORE)
    ((_, clusters),) = client.receive(CLUSTERS_TYPE, Request())
    ((_, endpoints),) = client.receive(ENDPOINTS_TYPE, Request(names=("a",)))
    assert clusters.nonce == endpoints.nonce
    client.receive(CLUSTERS_TYPE, Request(nonce=clusters.nonce))
    assert client.endpoints.acknowledged == {}
    client.receive(ENDPOINTS_TYPE, Request(names=names(form), nonce=endpoints.nonce, error="no"))
    assert client.clusters.acknowledged == {"a": OLD}
    assert (client.rejections, client.error) == (1, "no")


@FORMS
def test_other_types_are_not_answered(form: type[Session]) -> None:
    client = Client(form, BEFORE)
    other = "type.googleapis.com/envoy.config.listener.v3.Listener"
    assert client.receive(other, Request(names=("a",))) == []
    assert not client.asks_for("a")
