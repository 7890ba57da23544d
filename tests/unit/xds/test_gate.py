"""A worker may be chosen when the Envoys know its address."""

import pytest

from extproc.xds.gate import Gate
from extproc.xds.session import DeltaSession, Request, Resource

ONE = {"workers": Resource("1", b"", frozenset({"10.0.0.1:80"}))}
TWO = {"workers": Resource("2", b"", frozenset({"10.0.0.1:80", "10.0.0.2:80"}))}


def acknowledged(snapshot: dict[str, Resource]) -> DeltaSession:
    session = DeltaSession(snapshot)
    response = session.receive(Request(names=("workers",)))
    assert response is not None
    session.receive(Request(nonce=response.nonce))
    return session


def test_without_an_envoy_a_worker_waits_for_a_moment() -> None:
    gate = Gate(0.5)
    assert gate.look(ONE, [], 10.0) == (frozenset(), 0.5)
    assert gate.look(ONE, [], 10.5) == (frozenset({"10.0.0.1:80"}), None)


def test_a_worker_waits_for_every_envoy() -> None:
    gate, known = Gate(0.5), frozenset({"10.0.0.1:80"})
    first, second = acknowledged(ONE), acknowledged(ONE)
    assert gate.look(ONE, [first, second], 0.0) == (frozenset(), 0.5)
    assert gate.look(ONE, [first, second], 0.5) == (known, None)
    responses = [one.update(TWO) for one in (first, second)]
    assert gate.look(TWO, [first, second], 1.0) == (known, 0.5)
    assert gate.look(TWO, [first, second], 2.0) == (known, None)
    for session, response, expected in zip(
        (first, second), responses, (known, TWO["workers"].addresses), strict=True
    ):
        assert response is not None
        session.receive(Request(nonce=response.nonce))
        assert gate.look(TWO, [first, second], 100.0)[0] == expected


def test_an_envoy_that_connects_does_not_take_known_workers_away() -> None:
    gate, new = Gate(0.5), DeltaSession(ONE)
    gate.look(ONE, [], 0.0)
    assert gate.look(ONE, [acknowledged(ONE)], 0.5) == (ONE["workers"].addresses, None)
    new.receive(Request(names=("workers",)))
    assert gate.look(ONE, [new], 1.0) == (ONE["workers"].addresses, None)


def test_a_worker_that_comes_back_waits_again() -> None:
    gate, session = Gate(0.5), acknowledged(TWO)
    gate.look(TWO, [session], 0.0)
    assert gate.look(TWO, [session], 0.5) == (TWO["workers"].addresses, None)
    assert gate.look(ONE, [session], 1.0) == (ONE["workers"].addresses, None)
    # The Envoy uses it still, but one with a stream to another replica may not.
    assert gate.look(TWO, [session], 2.0) == (ONE["workers"].addresses, 0.5)
    assert gate.look(TWO, [session], 2.5) == (TWO["workers"].addresses, None)


@pytest.mark.parametrize("other", ["other", "*"])
def test_a_stream_for_something_else_counts_only_if_it_asks_for_all(other: str) -> None:
    gate, session = Gate(0.5), DeltaSession(None)
    session.receive(Request(names=(other,)))
    gate.look(ONE, [session], 0.0)
    known, wait = gate.look(ONE, [session], 0.5)
    assert (known, wait) == (frozenset() if other == "*" else ONE["workers"].addresses, None)
