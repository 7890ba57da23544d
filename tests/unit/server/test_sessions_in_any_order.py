"""Sessions under every order of messages and events: what Envoy gets is always well formed.

The machine plays Envoy and the stream: it sends messages, answers questions and lets deadlines
pass. One machine sends what a correct Envoy sends, and checks that each message gets its answer.
The other one repeats and swaps messages, and checks that no reply does harm.
"""

from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from extproc._protos import llm_extproc_pb2 as pb
from extproc.errors import RouterError, no_healthy_workers, prefill_failed, stale_request_expired
from extproc.routing.decision import Decision
from extproc.routing.pd.decode_order import DecodeOrder
from extproc.server.decode_session import DecodeSession
from extproc.server.route_session import RouteSession
from extproc.server.session import Session
from extproc.server.steps import Step
from tests.protocol.exchange import (
    MODES,
    header_map,
    kind,
    llm_body,
    request_body,
    request_headers,
    request_trailers,
    response_body,
    response_headers,
    response_trailers,
)
from tests.unit.server.building import make_context

ADDRESS = "10.0.0.1:8000"
ORDER = DecodeOrder(3, "10.0.0.1", "0a1b2c", (ADDRESS,))
ERRORS = st.sampled_from([no_healthy_workers(), prefill_failed(), stale_request_expired()])
PATHS = st.sampled_from(
    ["/v1/chat/completions", "/generate", "/v1/models", "/v1/tokenize", "/not-a-path"]
)
BODIES = st.sampled_from(
    [llm_body(), llm_body("other", x="y" * 200), b"", b"{", b"x" * 2000, b'{"model":7}']
)
SMALL_SETTINGS = settings(
    max_examples=200,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)


def decision(members: bytes) -> Decision:
    return Decision(
        model="m",
        policy="round_robin",
        reason="next",
        worker_url=f"http://{ADDRESS}",
        destinations=(ADDRESS,),
        timeout_ms=300_000,
        body_members=members,
    )


class Stream(RuleBasedStateMachine):
    """What Envoy and the stream have seen of one session."""

    decode_pass: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        context = make_context()
        self.admission = context.admission
        self.session: Session = (
            DecodeSession(context) if self.decode_pass else RouteSession(context)
        )
        self.mode, self.response_mode = "NONE" if self.decode_pass else "BUFFERED", "NONE"
        self.sent: list[str] = []
        self.bodies: list[bytes] = []
        self.replies: list[pb.ProcessingResponse] = []
        self.settled = 0
        self.codes: list[str] = []
        self.decided = False

    # -- what the stream does with a step

    def take(self, step: Step) -> None:
        self.replies += [pb.ProcessingResponse.FromString(reply) for reply in step.replies]
        if step.code:
            self.codes.append(step.code)
        if step.response is not None:
            assert self.decided, "settled before a decision"
            self.settled += 1
            if self.session.debug:
                self.take(self.session.served_by(f"http://{ADDRESS}", None, (0, 0)))

    def send(self, message: pb.ProcessingRequest) -> None:
        self.sent.append(str(message.WhichOneof("request")))
        self.bodies.append(message.request_body.body)
        self.take(self.session.receive(message.SerializeToString()))

    def headers(self, path: str, *, debug: bool, not_waiting: bool, end: bool) -> Any:
        if not self.decode_pass:
            return request_headers(
                path,
                mode=self.mode,
                response_mode=self.response_mode,
                not_waiting=not_waiting,
                end=end,
                x_extproc_debug=str(debug).lower(),
            )
        fields = {
            ":method": "POST",
            ":path": path,
            "x-extproc-model": "m",
            "x-extproc-decode-order": "x" if end else ORDER.to_header(),
            "x-extproc-debug": str(debug).lower(),
        }
        return pb.ProcessingRequest(request_headers=pb.HttpHeaders(headers=header_map(fields)))

    @property
    def answered(self) -> bool:
        return any(kind(reply) == "immediate_response" for reply in self.replies)

    # -- events that come from elsewhere, at any time

    @precondition(lambda self: self.session.question is not None)
    @rule(members=st.sampled_from([b"", b'"bootstrap_room":7']))
    def decide(self, members: bytes) -> None:
        self.decided = True
        self.take(self.session.routed(decision(members)))
        self.session.give_back()
        assert self.session.question is None

    @precondition(lambda self: self.session.question is not None)
    @rule(error=ERRORS)
    def refuse(self, error: RouterError) -> None:
        self.take(self.session.failed(error))
        assert self.session.question is None
        assert self.answered, "no answer to a request without a decision"

    @rule()
    def let_the_body_be_late(self) -> None:
        waited = self.session.waits_for_body
        self.take(self.session.body_timed_out())
        assert self.answered or not waited, "no answer to a body that is late"

    @precondition(lambda self: self.decided)
    @rule(error=ERRORS)
    def abort(self, error: RouterError) -> None:
        self.take(self.session.aborted(error))
        assert self.answered, "no answer to a request that is aborted"

    # -- what holds after each of them

    @invariant()
    def an_answer_of_the_service_comes_once_and_last(self) -> None:
        kinds = [kind(reply) for reply in self.replies]
        assert "immediate_response" not in kinds[:-1], kinds

    @invariant()
    def replies_are_in_the_order_of_the_messages(self) -> None:
        """Request and response are apart: Envoy may answer a request while it is being decided."""
        for direction in ("request_", "response_"):
            kinds = [kind(one) for one in self.replies if kind(one).startswith(direction)]
            left = [name for name in self.sent if name.startswith(direction)]
            for number, one in enumerate(kinds):
                # In full duplex a body is cut anew: pieces and messages need not match.
                if one in self.cut_anew and number > 0 and kinds[number - 1] == one:
                    continue
                assert one in left, f"{kinds} to {self.sent}"
                left = left[left.index(one) + 1 :]

    @property
    def cut_anew(self) -> list[str]:
        modes = {"request_body": self.mode, "response_body": self.response_mode}
        return [name for name, mode in modes.items() if mode == "FULL_DUPLEX_STREAMED"]

    def teardown(self) -> None:
        self.session.close()
        assert (self.admission.requests, self.admission.buffered_bytes) == (0, 0)

    @invariant()
    def only_what_is_there_is_admitted(self) -> None:
        assert self.admission.requests in (0, 1)
        assert 0 <= self.admission.buffered_bytes <= sum(len(one) for one in self.bodies)

    @invariant()
    def a_request_is_settled_and_counted_once(self) -> None:
        assert self.settled <= 1
        ended = [code for code in self.codes if code in ("routed", "answered")]
        errors = [code for code in self.codes if code not in ("routed", "answered")]
        assert len(ended) <= 1, self.codes
        assert len(errors) <= 1, self.codes
        if self.decode_pass:
            assert not self.codes, "the first pass counts"

    @invariant()
    def no_body_ends_twice(self) -> None:
        for name in ("request_body", "response_body"):
            ends = [
                getattr(reply, name).response.body_mutation.streamed_response.end_of_stream
                for reply in self.replies
                if kind(reply) == name
            ]
            assert not any(ends[:-1]), f"{name} goes on behind its end"

    @invariant()
    def a_question_is_open_only_for_a_request_without_an_answer(self) -> None:
        if self.session.question is not None:
            assert not self.answered
            assert not self.session.waits_for_body


class WildRoute(Stream):
    """Any message at any time, as after a fault of a proxy."""

    @initialize(mode=st.sampled_from(sorted(MODES)), response_mode=st.sampled_from(sorted(MODES)))
    def announce(self, mode: str, response_mode: str) -> None:
        self.mode, self.response_mode = mode, response_mode

    @rule(path=PATHS, debug=st.booleans(), not_waiting=st.booleans(), end=st.booleans())
    def send_headers(self, path: str, debug: bool, not_waiting: bool, end: bool) -> None:
        self.send(self.headers(path, debug=debug, not_waiting=not_waiting, end=end))

    @rule(body=BODIES, end=st.booleans())
    def send_body(self, body: bytes, end: bool) -> None:
        self.send(request_body(body, end=end))

    @rule()
    def send_trailers(self) -> None:
        self.send(request_trailers())

    @rule(status=st.sampled_from([200, 429, 503]), end=st.booleans())
    def send_response_headers(self, status: int, end: bool) -> None:
        self.send(response_headers(status, upstream=ADDRESS, end=end))

    @rule(end=st.booleans())
    def send_response_body(self, end: bool) -> None:
        self.send(response_body(b"x", end=end))

    @rule()
    def send_response_trailers(self) -> None:
        self.send(response_trailers())

    @rule()
    def send_nothing_known(self) -> None:
        self.take(self.session.receive(pb.ProcessingRequest().SerializeToString()))


class WildDecode(WildRoute):
    decode_pass = True


class CorrectRoute(Stream):
    """What a correct Envoy sends: in order, the end once, and the next message of a body only
    when the one before it has its reply, where the mode has a reply for each.
    """

    @initialize(
        mode=st.sampled_from(sorted(MODES)),
        response_mode=st.sampled_from(sorted(MODES)),
        path=PATHS,
        debug=st.booleans(),
        not_waiting=st.booleans(),
        trailers=st.booleans(),
    )
    def begin(
        self,
        mode: str,
        response_mode: str,
        path: str,
        debug: bool,
        not_waiting: bool,
        trailers: bool,
    ) -> None:
        self.mode, self.response_mode = mode, response_mode
        self.not_waiting = not_waiting
        self.with_trailers = trailers
        self.body, self.body_ended, self.trailers_sent = b"", False, False
        self.members = b""
        self.response_began = self.response_ended = False
        self.send(self.headers(path, debug=debug, not_waiting=not_waiting, end=False))

    @property
    def shows_body(self) -> bool:
        return self.mode != "NONE" and not self.answered

    @precondition(lambda self: self.shows_body and not self.body_ended)
    @rule(body=BODIES, end=st.booleans())
    def send_body(self, body: bytes, end: bool) -> None:
        whole = self.mode in ("BUFFERED", "BUFFERED_PARTIAL")
        if self.mode == "STREAMED" and not self.not_waiting and not self.got("request_headers"):
            return
        self.body += body
        self.body_ended = end or whole
        self.send(request_body(body, end=(end or whole) and not self.with_trailers))

    @precondition(lambda self: self.with_trailers and not self.trailers_sent and not self.answered)
    @rule()
    def send_trailers(self) -> None:
        whole = self.mode in ("BUFFERED", "BUFFERED_PARTIAL")
        if not self.body_ended or (whole and not self.got("request_body")):
            return
        self.trailers_sent = True
        self.send(request_trailers())

    @precondition(lambda self: self.got("request_headers") and self.decided and not self.answered)
    @rule(status=st.sampled_from([200, 503]))
    def begin_response(self, status: int) -> None:
        if self.response_began:
            return
        self.response_began = True
        self.send(response_headers(status, upstream=ADDRESS))
        assert self.got("response_headers"), "the response waits for ever"
        assert self.settled == 1

    @precondition(lambda self: self.response_began and not self.response_ended)
    @rule(end=st.booleans())
    def send_response_body(self, end: bool) -> None:
        if self.answered:
            return
        before = len(self.replies)
        self.response_ended = end
        self.send(response_body(b"x", end=end))
        assert len(self.replies) > before, "a piece of the response waits for ever"

    @property
    def request_ended(self) -> bool:
        if self.mode in ("BUFFERED", "BUFFERED_PARTIAL") or not self.with_trailers:
            return self.body_ended
        return self.trailers_sent

    def got(self, name: str) -> bool:
        return any(kind(reply) == name for reply in self.replies)

    @invariant()
    def nothing_waits_for_ever(self) -> None:
        """A message without a reply waits for the decision or for more of the body."""
        if not self.sent or self.answered or self.session.question is not None:
            return
        if self.session.waits_for_body:
            assert not self.request_ended, "the whole body is here, and nothing happens"
            return
        if self.mode in ("STREAMED", "FULL_DUPLEX_STREAMED") and not self.request_ended:
            return
        for name in dict.fromkeys(self.sent):
            assert self.got(name), f"no reply to {name}"

    @invariant()
    def a_body_in_full_duplex_arrives_whole(self) -> None:
        if self.mode != "FULL_DUPLEX_STREAMED" or not self.decided or self.answered:
            return
        pieces = [
            reply.request_body.response.body_mutation.streamed_response
            for reply in self.replies
            if kind(reply) == "request_body"
        ]
        echoed = b"".join(piece.body for piece in pieces)
        assert echoed == self.body or echoed.endswith(b'"bootstrap_room":7}')
        assert pieces[-1].end_of_stream == (not self.with_trailers)


@pytest.mark.hypothesis
@pytest.mark.parametrize("machine", [WildRoute, WildDecode, CorrectRoute])
def test_replies_are_well_formed_in_any_order(machine: type[Stream]) -> None:
    run_state_machine_as_test(machine, settings=SMALL_SETTINGS)
