"""What a client of discovery is sent, and what it has acknowledged."""

from collections.abc import Mapping

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from extproc.xds.session import (
    DeltaSession,
    Request,
    Resource,
    Response,
    Session,
    StateSession,
)

A1, A2, B1 = (Resource(version, b"") for version in ("a1", "a2", "b1"))
NAMES = ("a", "b", "c")


@pytest.mark.parametrize("kind", [StateSession, DeltaSession])
class TestBothForms:
    def test_nothing_is_sent_before_the_workers_are_known(self, kind: type[Session]) -> None:
        session = kind(None)
        assert session.receive(Request(names=("a",))) is None
        response = session.update({"a": A1})
        assert response is not None
        assert response.resources == {"a": A1}

    def test_a_change_waits_for_the_answer(self, kind: type[Session]) -> None:
        session = kind({"a": A1})
        first = session.receive(Request(names=("a",)))
        assert first is not None
        assert session.update({"a": A2}) is None
        assert session.acknowledged == {}
        second = session.receive(answer(kind, first))
        assert second is not None
        assert second.resources == {"a": A2}
        assert session.acknowledged == {"a": A1}

    def test_a_rejected_resource_is_shown_and_not_sent_again(self, kind: type[Session]) -> None:
        session = kind({"a": A1})
        first = session.receive(Request(names=("a",)))
        assert first is not None
        assert session.receive(answer(kind, first, "bad port")) is None
        assert (session.error, session.rejections) == ("bad port", 1)
        assert session.acknowledged == {}
        assert session.update({"a": A1}) is None
        second = session.update({"a": A2})
        assert second is not None
        assert session.receive(answer(kind, second)) is None
        assert (session.error, session.rejections) == (None, 1)
        assert session.acknowledged == {"a": A2}

    def test_an_answer_with_an_unknown_nonce_acknowledges_nothing(
        self, kind: type[Session]
    ) -> None:
        session = kind({"a": A1})
        assert session.receive(Request(names=("a",)))
        names = ("a",) if kind is StateSession else ()
        assert session.receive(Request(names=names, nonce="other")) is None
        assert session.acknowledged == {}

    def test_a_first_request_without_names_asks_for_all(self, kind: type[Session]) -> None:
        response = kind({"a": A1, "b": B1}).receive(Request())
        assert response is not None
        assert response.resources == {"a": A1, "b": B1}


def answer(kind: type[Session], response: Response, error: str | None = None) -> Request:
    return Request(names=("a",) if kind is StateSession else (), nonce=response.nonce, error=error)


def test_delta_tells_of_a_name_that_does_not_exist_once() -> None:
    session = DeltaSession({})
    response = session.receive(Request(names=("a",)))
    assert response is not None
    assert response.removed == ("a",)
    assert session.receive(Request(nonce=response.nonce)) is None
    added = session.update({"a": A1})
    assert added is not None
    assert added.resources == {"a": A1}


def test_a_client_that_has_everything_from_another_replica_is_sent_nothing() -> None:
    session = DeltaSession({"a": A1, "b": B1})
    first = Request(names=("a", "b"), known_versions={"a": "a1", "b": "b0"})
    response = session.receive(first)
    assert response is not None
    assert response.resources == {"b": B1}
    assert session.acknowledged["a"] == A1
    assert session.acknowledged["b"].addresses == frozenset()


class Client(RuleBasedStateMachine):
    """A client that answers when it likes, and changes its mind."""

    kind: type[Session]

    @initialize(known=st.booleans())
    def begin(self, known: bool) -> None:
        self.snapshot: dict[str, Resource] = {}
        self.session = self.kind(self.snapshot if known else None)
        self.wanted: set[str] = set()
        self.has: dict[str, Resource] = {}
        self.waiting: Response | None = None
        self.known = known
        self.begun = False
        self.turn = 0
        # Rejected and not changed since.
        self.refused: dict[str, Resource | None] = {}

    @rule(present=st.sets(st.sampled_from(NAMES)), fresh=st.booleans())
    def change(self, present: set[str], fresh: bool) -> None:
        self.turn += 1
        self.known = True
        before = self.snapshot
        self.snapshot = {
            name: Resource(f"{name}{self.turn}", b"")
            if fresh
            else before.get(name, Resource(f"{name}{self.turn}", b""))
            for name in present
        }
        self.take(self.session.update(self.snapshot))

    @rule(names=st.sets(st.sampled_from(NAMES), min_size=1))
    def subscribe(self, names: set[str]) -> None:
        raise NotImplementedError

    @rule(error=st.sampled_from([None, None, "no"]))
    def reply(self, error: str | None) -> None:
        if self.waiting is None:
            return
        response, self.waiting = self.waiting, None
        told: Mapping[str, Resource | None] = {
            **response.resources,
            **dict.fromkeys(response.removed),
        }
        for name, one in told.items():
            if error is not None:
                self.refused[name] = one
                continue
            self.refused.pop(name, None)
            if one is None:
                self.has.pop(name, None)
            elif name in self.wanted:
                self.has[name] = one
        self.acknowledge(response, error)

    def acknowledge(self, response: Response, error: str | None) -> None:
        raise NotImplementedError

    def take(self, response: Response | None) -> None:
        if response is not None:
            assert self.waiting is None, "one response at a time"
            assert self.known
            self.waiting = response

    @invariant()
    def in_the_end_it_has_what_it_wants(self) -> None:
        if not getattr(self, "begun", False) or self.waiting is not None or not self.known:
            return
        for name in self.wanted & self.snapshot.keys():
            current = self.snapshot[name]
            assert self.has.get(name) == current or self.refused.get(name) == current
        for name, one in self.session.acknowledged.items():
            assert self.has[name] == one


class StateClient(Client):
    kind = StateSession

    @rule(names=st.sets(st.sampled_from(NAMES), min_size=1))
    def subscribe(self, names: set[str]) -> None:
        if self.waiting is not None:
            return  # Envoy answers first.
        self.has = {name: one for name, one in self.has.items() if name in names}
        self.refused = {name: one for name, one in self.refused.items() if name in names}
        self.wanted, self.begun = set(names), True
        nonce = str(self.session._nonce or "")
        self.take(self.session.receive(Request(names=tuple(sorted(names)), nonce=nonce)))

    def acknowledge(self, response: Response, error: str | None) -> None:
        request = Request(names=tuple(sorted(self.wanted)), nonce=response.nonce, error=error)
        self.take(self.session.receive(request))


class DeltaClient(Client):
    kind = DeltaSession

    @rule(names=st.sets(st.sampled_from(NAMES), min_size=1))
    def subscribe(self, names: set[str]) -> None:
        new, old = names - self.wanted, self.wanted - names
        for name in new | old:
            self.has.pop(name, None)
            self.refused.pop(name, None)
        self.wanted, self.begun = set(names), True
        request = Request(names=tuple(sorted(new)), unsubscribed=tuple(sorted(old)))
        response = self.session.receive(request)
        self.take(response)

    def acknowledge(self, response: Response, error: str | None) -> None:
        self.take(self.session.receive(Request(nonce=response.nonce, error=error)))


TestStateClient = StateClient.TestCase
TestDeltaClient = DeltaClient.TestCase


def test_delta_tells_of_a_resource_that_is_gone() -> None:
    session = DeltaSession({"a": A1})
    first = session.receive(Request(names=("a",)))
    assert first is not None
    session.receive(Request(nonce=first.nonce))
    gone = session.update({})
    assert gone is not None
    assert (gone.resources, gone.removed) == ({}, ("a",))
    assert session.acknowledged == {"a": A1}
    assert session.receive(Request(nonce=gone.nonce)) is None
    assert session.acknowledged == {}


def test_a_name_that_is_asked_for_again_is_sent_again() -> None:
    session = DeltaSession({"a": A1})
    first = session.receive(Request(names=("a",)))
    assert first is not None
    session.receive(Request(nonce=first.nonce))
    again = session.receive(Request(names=("a",)))
    assert again is not None
    assert again.resources == {"a": A1}
    assert session.acknowledged == {}
