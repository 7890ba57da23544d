"""A decision that adds members to the body, in every mode that shows it."""

import json

import msgspec
import pytest

from extproc.routing.lease import Lease
from extproc.routing.pd.pair import Pair
from extproc.routing.request import Request
from tests.protocol.exchange import (
    Service,
    destination,
    echoed,
    kind,
    llm_body,
    request_body,
    request_headers,
    serving,
    set_headers,
    stream,
)

MEMBERS = b'"routed_dp_rank":2'
BODY = llm_body(routed_dp_rank=0, big=2**60 + 1, pad="x" * 70_000)


class Telling(Service):
    """A service whose decisions tell the engine a rank."""

    async def route(self, request: Request) -> Lease | Pair:
        lease = await super().route(request)
        lease.decision = msgspec.structs.replace(lease.decision, body_members=MEMBERS)
        return lease


def changed(body: bytes) -> bool:
    """True if the rank is that of the decision, and the rest that of the client."""
    of_client = json.loads(BODY) | {"routed_dp_rank": 2}
    return json.loads(body) == of_client and body.endswith(b"," + MEMBERS + b"}")


@pytest.mark.parametrize("mode", ["BUFFERED", "BUFFERED_PARTIAL"])
async def test_one_message_is_replaced(mode: str) -> None:
    async with serving(Telling(["m"], 1)) as service, stream(service) as envoy:
        await envoy.send(request_headers(mode=mode), request_body(BODY))
        _, reply = await envoy.replies(2)
        assert kind(reply) == "request_body"
        assert destination(reply) == "10.0.0.1:8000"
        new = reply.request_body.response.body_mutation.body
        assert changed(new)
        # Envoy refuses a wrong length in the one mode, and has taken the header away in the other.
        length = set_headers(reply).get("content-length")
        assert length == (str(len(new)) if mode == "BUFFERED" else None)


async def test_the_first_of_several_pieces_becomes_the_whole_body() -> None:
    pieces = [BODY[:30_000], BODY[30_000:60_000], BODY[60_000:]]
    async with serving(Telling(["m"], 1)) as service, stream(service) as envoy:
        await envoy.send(request_headers(mode="STREAMED", not_waiting=True))
        for piece in pieces:
            await envoy.send(request_body(piece, end=piece is pieces[-1]))
        head, first, *rest = await envoy.replies(4)
        assert kind(head) == "request_headers"
        assert destination(head) == "10.0.0.1:8000"
        assert changed(first.request_body.response.body_mutation.body)
        assert all(one.request_body.response.body_mutation.clear_body for one in rest)
        await envoy.no_reply()


async def test_the_echo_in_full_duplex_is_the_new_body() -> None:
    async with serving(Telling(["m"], 1)) as service, stream(service) as envoy:
        await envoy.send(request_headers(mode="FULL_DUPLEX_STREAMED"))
        await envoy.send(request_body(BODY[:100], end=False), request_body(BODY[100:]))
        head, *pieces = await envoy.replies(3)
        assert destination(head) == "10.0.0.1:8000"
        body, ends = echoed(pieces)
        assert changed(body)
        assert ends == [False, True]


async def test_a_body_that_was_not_sent_is_left_unchanged() -> None:
    async with serving(Telling(["m"], 1)) as service, stream(service) as envoy:
        await envoy.send(request_headers(mode="NONE"))
        assert destination(await envoy.reply()) == "10.0.0.1:8000"
        await envoy.no_reply()


class TellingByHeader(Service):
    """A service whose decisions tell the engine a rank in a header."""

    async def route(self, request: Request) -> Lease | Pair:
        lease = await super().route(request)
        lease.decision = msgspec.structs.replace(lease.decision, rank_header=len(request.body) % 7)
        return lease


async def test_a_rank_for_an_engine_that_reads_headers_is_set_as_a_header() -> None:
    async with serving(TellingByHeader(["m"], 1)) as service:
        for pad in ("", "x", "xx"):
            body = llm_body(pad=pad)
            async with stream(service) as envoy:
                await envoy.send(request_headers(mode="BUFFERED"), request_body(body))
                _, reply = await envoy.replies(2)
                assert set_headers(reply)["x-data-parallel-rank"] == str(len(body) % 7)
                assert not reply.request_body.response.body_mutation.body
