"""What a client says to steer an engine is removed on every path and in every body mode."""

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from extproc._protos import llm_extproc_pb2 as pb
from extproc.routing.decision import Decision
from extproc.routing.request import ENDPOINT_PATHS, MODELS_PATH, Request, find_endpoint
from extproc.server.route_session import RouteSession
from extproc.server.steps import NOTHING
from extproc.steering import STEERING_HEADER_PREFIXES, STEERING_MEMBERS
from tests.protocol.exchange import (
    destination,
    echoed,
    error,
    kind,
    request_body,
    request_headers,
    request_trailers,
)
from tests.unit.server.building import make_context

PATHS = [path for path in ENDPOINT_PATHS if path != MODELS_PATH]
# The mode of the gateway and whether it waits for the reply to the headers.
MODES = [
    ("BUFFERED", False),
    ("BUFFERED_PARTIAL", False),
    ("STREAMED", True),
    ("FULL_DUPLEX_STREAMED", False),
    ("STREAMED", False),
]
LATE = MODES[-1]
DECISION = Decision(
    model="m",
    policy="round_robin",
    reason="next",
    worker_url="http://10.0.0.1:8000",
    destinations=("10.0.0.1:8000",),
    timeout_ms=0,
)
OURS = b'"routed_dp_rank":7'
VALUES = '{"a":[1.50e+3,12345678901234567890123],"é":"\\ud83d\\ude00"}'


def spelled(name: str) -> list[str]:
    """JSON strings that all mean the name."""
    escaped = name.replace("_", "\\u005F")
    return [
        f'"{name}"',
        f'"\\u{ord(name[0]):04x}{name[1:]}"',
        f'"{escaped}"',
    ]


def steered(name: str) -> bytes:
    """A body with the member in every spelling, twice, around a value that is not to change."""
    mine = ",".join(f"{key}:1,{key}:null" for key in spelled(name))
    return f'{{{mine},"model":"m","kept":{VALUES},{mine},"stream":false}}'.encode()


def run(path: str, mode: str, not_waiting: bool, body: bytes, members: bytes = b"") -> bytes:
    """The body as the engine gets it."""
    session = RouteSession(make_context(max_body_bytes=1 << 20))
    out = [*receive(session, request_headers(path, mode=mode, not_waiting=not_waiting))]
    decision = msgspec.structs.replace(DECISION, body_members=members)
    if isinstance(session.question, Request):  # the gateway does not show the body before
        out += decided(session, decision)
    pieces = [body] if mode.startswith("BUFFERED") else [body[:40], body[40:50], body[50:]]
    for piece in pieces:
        out += receive(session, request_body(piece, end=piece is pieces[-1]))
    if isinstance(session.question, Request):
        out += decided(session, decision)
    return forwarded(body, pieces, out)


def receive(session: RouteSession, message: pb.ProcessingRequest) -> list[pb.ProcessingResponse]:
    return parsed(session.receive(message.SerializeToString()).replies)


def decided(session: RouteSession, decision: Decision) -> list[pb.ProcessingResponse]:
    return parsed(session.routed(decision).replies)


def parsed(raw: Sequence[bytes]) -> list[pb.ProcessingResponse]:
    return [pb.ProcessingResponse.FromString(reply) for reply in raw]


def forwarded(body: bytes, pieces: list[bytes], replies: list[pb.ProcessingResponse]) -> bytes:
    """What Envoy sends on, by these replies."""
    bodies = [reply for reply in replies if kind(reply) == "request_body"]
    if bodies and bodies[0].request_body.response.body_mutation.HasField("streamed_response"):
        return echoed(bodies)[0]
    assert len(bodies) == len(pieces)
    sent = b""
    for piece, reply in zip(pieces, bodies, strict=True):
        mutation = reply.request_body.response.body_mutation
        match mutation.WhichOneof("mutation"):
            case "body":
                sent += mutation.body
            case "clear_body":
                pass
            case _:
                sent += piece
    return sent


def names(body: bytes) -> list[str]:
    found: list[str] = json.loads(body, object_pairs_hook=lambda pairs: [n for n, _ in pairs])
    return found


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", sorted(STEERING_MEMBERS))
def test_a_member_of_the_client_does_not_reach_the_engine(name: str, path: str) -> None:
    for mode, not_waiting in MODES:
        if find_endpoint("POST", path).answered_locally and (mode, not_waiting) == LATE:
            continue  # the body comes too late to be answered
        sent = run(path, mode, not_waiting, steered(name))
        assert names(sent) == ["model", "kept", "stream"], mode
        assert VALUES.encode() in sent


@pytest.mark.parametrize(("mode", "not_waiting"), MODES[:-1])
@pytest.mark.parametrize("name", ["routed_dp_rank", "bootstrap_room"])
def test_the_services_own_member_is_there_once(name: str, mode: str, not_waiting: bool) -> None:
    sent = run("/generate", mode, not_waiting, steered(name), OURS)
    assert names(sent) == ["model", "kept", "stream", "routed_dp_rank"]
    assert json.loads(sent)["routed_dp_rank"] == 7


@pytest.mark.parametrize("prompt_max_bytes", [0, 1 << 20])
@pytest.mark.parametrize("path", PATHS)
def test_a_body_without_such_members_is_neither_copied_nor_replaced(
    path: str, prompt_max_bytes: int
) -> None:
    session = RouteSession(make_context(prompt_max_bytes=prompt_max_bytes))
    body = b'{"model":"m","prompt":"routed_dp_rank","vllm_xargs":{"a":"kv_transfer_params"}}'
    receive(session, request_headers(path))
    message = request_body(body)
    receive(session, message)
    assert isinstance(session.question, Request)
    assert session.question.body == body
    (reply,) = decided(session, DECISION)
    assert not reply.request_body.response.HasField("body_mutation")


@pytest.mark.parametrize("name", sorted(STEERING_MEMBERS))
def test_members_are_removed_from_the_map_that_vllm_merges(name: str) -> None:
    inside = ",".join(f"{key}:1" for key in spelled(name))
    body = f'{{"model":"m","vllm_xargs":{{{inside},"kept":{VALUES}}}}}'.encode()
    sent = run("/v1/completions", "BUFFERED", False, body)
    assert sent == f'{{"model":"m","vllm_xargs":{{"kept":{VALUES}}}}}'.encode()


@pytest.mark.parametrize("value", ["1", "null", '"x"', "[1]", "{}"])
def test_a_map_of_another_type_is_left_to_the_engine(value: str) -> None:
    body = f'{{"model":"m","vllm_xargs":{value}}}'.encode()
    assert run("/v1/completions", "BUFFERED", False, body) == body


# -- a body that comes after the decision


def late() -> RouteSession:
    session = RouteSession(make_context(max_body_bytes=1 << 20))
    receive(session, request_headers(mode="STREAMED"))
    decided(session, DECISION)
    return session


@pytest.mark.parametrize("body", [b'{"model":"m","routed_dp_rank":NaN}', b"{", b"[]"])
def test_a_late_body_that_cannot_be_checked_does_not_reach_the_engine(body: bytes) -> None:
    session = late()
    assert not session.may_end_early
    assert session.receive(request_body(body[:1], end=False).SerializeToString()) == NOTHING
    (reply,) = receive(session, request_body(body[1:]))
    assert error(reply)[:2] == (400, "bad_request")


def test_a_late_body_is_limited() -> None:
    session = RouteSession(make_context(max_body_bytes=10))
    receive(session, request_headers(mode="STREAMED"))
    decided(session, DECISION)
    (reply,) = receive(session, request_body(b"x" * 11, end=False))
    assert error(reply)[:2] == (413, "payload_too_large")


def test_a_late_body_may_end_with_trailers() -> None:
    session = late()
    body = steered("routed_dp_rank")
    assert receive(session, request_body(body, end=False)) == []
    first, trailers = receive(session, request_trailers())
    sent = first.request_body.response.body_mutation.body
    assert names(sent) == ["model", "kept", "stream"]
    assert kind(trailers) == "request_trailers"
    assert session.may_end_early


# -- headers


HEADERS = ["x-data-parallel-rank", *(f"{prefix}any" for prefix in STEERING_HEADER_PREFIXES)]


@pytest.mark.parametrize("respell", [str, str.title, lambda name: name.replace("-", "_")])
@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("mode", ["BUFFERED", "NONE", "STREAMED", "FULL_DUPLEX_STREAMED"])
def test_a_header_of_the_client_is_removed_by_the_decision(
    name: str, mode: str, respell: Any
) -> None:
    session = RouteSession(make_context())
    message = request_headers(mode=mode)
    for key in (respell(name), "x-other"):
        message.request_headers.headers.headers.add(key=key, raw_value=b"1")
    for _ in range(2):  # the second time the head is looked up
        session = RouteSession(session._context)
        receive(session, message)
        if mode not in ("NONE", "STREAMED"):
            receive(session, request_body(b'{"model":"m"}'))
        reply = decided(session, DECISION)[0]
        assert destination(reply) == "10.0.0.1:8000"
        mutation = getattr(reply, kind(reply)).response.header_mutation
        assert list(mutation.remove_headers) == [respell(name)]


def test_the_paths_answered_here_send_nothing_to_an_engine() -> None:
    session = RouteSession(make_context())
    message = request_headers(MODELS_PATH, method="GET", end=True, x_data_parallel_rank="1")
    (reply,) = receive(session, message)
    assert kind(reply) == "immediate_response"
    assert reply.immediate_response.status.code == 200
