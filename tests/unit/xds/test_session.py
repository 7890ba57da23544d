"""What a client of discovery is sent, and what it has acknowledged."""

import pytest

from extproc.xds.session import (
    NAMES_MAX,
    DeltaSession,
    Request,
    Resource,
    Response,
    Session,
    StateSession,
    StreamLimitError,
)

A1, A2, B1 = (Resource(version, b"") for version in ("a1", "a2", "b1"))


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


def test_what_a_client_has_is_known_although_it_connects_before_the_workers_are() -> None:
    one = Resource("a1", b"a", frozenset({"10.0.0.1:80"}))
    session = DeltaSession(None)
    assert session.receive(Request(names=("a",), known_versions={"a": "a1"})) is None
    assert session.acknowledged["a"].addresses == frozenset()
    assert session.update({"a": one}) is None
    assert session.acknowledged == {"a": one}


def test_what_a_client_wanted_before_it_saw_the_last_response_does_not_count() -> None:
    session = StateSession({"a": A1})
    first = session.receive(Request(names=("a",)))
    assert first is not None
    session.receive(Request(names=("a",), nonce=first.nonce))
    second = session.update({"a": A2, "b": B1})
    assert second is not None
    assert session.receive(Request(names=("a", "b"), nonce=first.nonce)) is None
    assert not session.subscribes_to("b")
    third = session.receive(Request(names=("a", "b"), nonce=second.nonce))
    assert third is not None
    assert third.resources == {"a": A2, "b": B1}


def test_names_that_come_and_go_beside_a_wildcard_add_up() -> None:
    """With a wildcard, the session keeps each name that it has reported as removed."""
    session = DeltaSession({"a": A1})
    names = tuple(str(number) for number in range(NAMES_MAX))
    first = session.receive(Request(names=("*", *names[:-1])))
    assert first is not None
    session.receive(Request(unsubscribed=names, nonce=first.nonce))
    second = session.receive(Request(names=("x",)))
    assert second is not None
    session.receive(Request(unsubscribed=("x",), nonce=second.nonce))
    session.receive(Request(names=("y",)))
    with pytest.raises(StreamLimitError, match="the stream names more than"):
        session.receive(Request(unsubscribed=("y",)))
