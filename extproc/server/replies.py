"""Builds the serialised replies to Envoy.

Replies that never vary are built once. A routing reply depends only on the decision, and few
decisions differ, so the serialised replies are kept in a bounded table.
"""

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Final

from google.protobuf.struct_pb2 import Struct, Value

from extproc._protos import llm_extproc_pb2 as pb
from extproc.config.envoy import EnvoyConfig
from extproc.errors import RETRY_AFTER_SECONDS, RouterError, anthropic_envelope, envelope
from extproc.headers import (
    ATTEMPTS_NAMESPACE,
    AUTHORIZATION_HEADER,
    CONTENT_LENGTH_HEADER,
    CONTENT_TYPE_HEADER,
    DECISION_NAMESPACE,
    DECODE_CLUSTER,
    DECODE_ORDER_HEADER,
    DECODE_WORKER_HEADER,
    DESTINATION_HEADER,
    DESTINATION_NAMESPACE,
    ERROR_CODE_HEADER,
    FIRST_BYTE_TIMEOUT_HEADER,
    MAX_RETRIES_HEADER,
    OVERLAP_HEADER,
    POLICY_HEADER,
    REASON_HEADER,
    REQUEST_ID_HEADER,
    REQUEST_TIMEOUT_HEADER,
    RETRIABLE_STATUS_HEADER,
    RETRY_AFTER_HEADER,
    RETRY_ON_HEADER,
    WORKER_HEADER,
)
from extproc.routing.decision import Decision
from extproc.steering import DATA_PARALLEL_RANK_HEADER

__all__ = [
    "REQUEST_BODY_CONTINUE",
    "REQUEST_HEADERS_CONTINUE",
    "REQUEST_TRAILERS_CONTINUE",
    "RESPONSE_BODY_CONTINUE",
    "RESPONSE_HEADERS_CONTINUE",
    "RESPONSE_TRAILERS_CONTINUE",
    "ReplyBuilder",
    "at_work",
    "attempt_reported",
    "debug_decode_worker",
    "debug_response_headers",
    "immediate_response",
    "request_body_pieces",
    "request_body_replacements",
    "response_body_piece",
    "with_request_body",
    "with_retry_after",
    "without_request_headers",
]

# Some builds of Envoy refuse pieces of more than 64 KiB in full duplex.
_PIECE_MAX_BYTES: Final = 62_000
_TABLE_MAX_ENTRIES: Final = 4096
_BUSY_STATUSES: Final = "429,503"
_OVERWRITE: Final = pb.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD

REQUEST_HEADERS_CONTINUE: Final = pb.ProcessingResponse(
    request_headers=pb.HeadersResponse()
).SerializeToString()
REQUEST_BODY_CONTINUE: Final = pb.ProcessingResponse(
    request_body=pb.BodyResponse()
).SerializeToString()
REQUEST_TRAILERS_CONTINUE: Final = pb.ProcessingResponse(
    request_trailers=pb.TrailersResponse()
).SerializeToString()
RESPONSE_HEADERS_CONTINUE: Final = pb.ProcessingResponse(
    response_headers=pb.HeadersResponse()
).SerializeToString()
RESPONSE_BODY_CONTINUE: Final = pb.ProcessingResponse(
    response_body=pb.BodyResponse()
).SerializeToString()
RESPONSE_TRAILERS_CONTINUE: Final = pb.ProcessingResponse(
    response_trailers=pb.TrailersResponse()
).SerializeToString()


def _set_headers(pairs: Iterable[tuple[str, str]]) -> pb.HeaderMutation:
    return pb.HeaderMutation(
        set_headers=[
            pb.HeaderValueOption(
                header=pb.HeaderValue(key=name, raw_value=value.encode()),
                append_action=_OVERWRITE,
            )
            for name, value in pairs
        ]
    )


class ReplyBuilder:
    """Builds routing replies for one configuration.

    `authorization` is set on every routed request where the configuration asks for it.
    """

    def __init__(self, envoy: EnvoyConfig, authorization: str | None) -> None:
        self._envoy = envoy
        self._authorization = authorization
        self._table: dict[tuple[object, ...], bytes] = {}

    def routed(self, decision: Decision, *, in_body: bool, request_id: str | None) -> bytes:
        """Return the reply that carries a decision, to the body or to the headers message.

        `request_id` is given when the request came without one.
        """
        key = (
            decision.model,
            decision.reason,
            decision.attempts,
            decision.destinations,
            decision.timeout_ms,
            in_body,
            bool(decision.body_members),
            decision.rank_header,
            decision.retry_busy,
            decision.first_byte_timeout_ms,
            decision.role,
        )
        reply = self._table.get(key) if request_id is None else None
        if reply is None:
            reply = self._build(decision, in_body, request_id)
            if request_id is None:
                if len(self._table) >= _TABLE_MAX_ENTRIES:
                    self._table.clear()
                self._table[key] = reply
        if decision.decode_order:
            # Every decode order differs, so it is not in the table. Two serialised messages in a
            # row are one message with the fields of both.
            order = pb.CommonResponse(
                header_mutation=_set_headers(((DECODE_ORDER_HEADER, decision.decode_order),))
            )
            reply += _to_request(order, in_body=in_body).SerializeToString()
        return reply

    def _build(self, decision: Decision, in_body: bool, request_id: str | None) -> bytes:
        destination = ",".join(decision.destinations)
        second_pass = bool(decision.decode_order)
        cluster = self._envoy.cluster_of(decision.model, decision.role)
        pairs = [
            (self._envoy.cluster_header, DECODE_CLUSTER if second_pass else cluster),
            (self._envoy.model_header, decision.model),
        ]
        if second_pass:
            pairs.append((MAX_RETRIES_HEADER, str(decision.attempts - 1)))
        else:
            pairs.append((DESTINATION_HEADER, destination))
            # As many attempts as there are destinations: one more would leave the list.
            pairs.append((MAX_RETRIES_HEADER, str(len(decision.destinations) - 1)))
        if decision.retry_busy:
            # Added to what the route retries; the body fits every destination.
            pairs.append((RETRY_ON_HEADER, "retriable-status-codes"))
            pairs.append((RETRIABLE_STATUS_HEADER, _BUSY_STATUSES))
        if decision.timeout_ms:
            pairs.append((REQUEST_TIMEOUT_HEADER, str(decision.timeout_ms)))
        if decision.first_byte_timeout_ms:
            pairs.append((FIRST_BYTE_TIMEOUT_HEADER, str(decision.first_byte_timeout_ms)))
        if self._authorization is not None:
            pairs.append((AUTHORIZATION_HEADER, self._authorization))
        if request_id is not None:
            pairs.append((REQUEST_ID_HEADER, request_id))
        if decision.rank_header is not None:
            pairs.append((DATA_PARALLEL_RANK_HEADER, str(decision.rank_header)))
        common = pb.CommonResponse(header_mutation=_set_headers(pairs), clear_route_cache=True)
        if decision.body_members:
            # Otherwise a client could contradict the body, where the gateway does not strip it.
            common.header_mutation.remove_headers.append(DATA_PARALLEL_RANK_HEADER)
        metadata = Struct()
        if not second_pass:
            metadata.fields[DESTINATION_NAMESPACE].CopyFrom(
                Value(struct_value=_text_struct(((DESTINATION_HEADER, destination),)))
            )
        metadata.fields[DECISION_NAMESPACE].CopyFrom(
            Value(
                struct_value=_text_struct(
                    (
                        ("model", decision.model),
                        ("policy", decision.policy),
                        ("reason", decision.reason),
                        ("destination", destination),
                    )
                )
            )
        )
        response = _to_request(common, in_body=in_body)
        response.dynamic_metadata.CopyFrom(metadata)
        return response.SerializeToString()


def _to_request(common: pb.CommonResponse, *, in_body: bool) -> pb.ProcessingResponse:
    """A reply to the body of a request, or to its headers."""
    if in_body:
        return pb.ProcessingResponse(request_body=pb.BodyResponse(response=common))
    return pb.ProcessingResponse(request_headers=pb.HeadersResponse(response=common))


def _text_struct(pairs: Iterable[tuple[str, str]]) -> Struct:
    struct = Struct()
    for name, text in pairs:
        struct.fields[name].string_value = text
    return struct


def without_request_headers(reply: bytes, names: Iterable[str], *, in_body: bool) -> bytes:
    """The reply that carries a decision, and that also removes headers of the request."""
    removal = pb.CommonResponse(header_mutation=pb.HeaderMutation(remove_headers=names))
    return reply + _to_request(removal, in_body=in_body).SerializeToString()


def with_request_body(reply: bytes, body: bytes, *, set_length: bool) -> bytes:
    """A reply to the request body that also replaces it.

    Two serialised messages in a row are one message with the fields of both. With `set_length`
    the header gets the new length: in BUFFERED mode Envoy insists on that, in other modes it has
    removed the header.
    """
    headers = _set_headers(((CONTENT_LENGTH_HEADER, str(len(body))),)) if set_length else None
    common = pb.CommonResponse(header_mutation=headers, body_mutation=pb.BodyMutation(body=body))
    replacement = pb.ProcessingResponse(request_body=pb.BodyResponse(response=common))
    return reply + replacement.SerializeToString()


def request_body_replacements(body: bytes, chunks: int) -> list[bytes]:
    """Replies to the pieces of a streamed body: the whole new body first, then empty ones."""
    mutations = [pb.BodyMutation(body=body), *[pb.BodyMutation(clear_body=True)] * (chunks - 1)]
    return [
        pb.ProcessingResponse(
            request_body=pb.BodyResponse(response=pb.CommonResponse(body_mutation=mutation))
        ).SerializeToString()
        for mutation in mutations
    ]


def request_body_pieces(body: bytes | bytearray, *, end_of_stream: bool) -> list[bytes]:
    """A request body echoed in full duplex: at least one message, the end only on the last."""
    view = memoryview(body)
    starts = range(0, len(body), _PIECE_MAX_BYTES) or range(1)
    last = starts[-1]
    return [
        pb.ProcessingResponse(
            request_body=_streamed(
                bytes(view[start : start + _PIECE_MAX_BYTES]), end_of_stream and start == last
            )
        ).SerializeToString()
        for start in starts
    ]


def response_body_piece(body: bytes, *, end_of_stream: bool) -> Sequence[bytes]:
    """One piece of a response echoed in full duplex, split where it is too large."""
    starts = range(0, len(body), _PIECE_MAX_BYTES) or range(1)
    last = starts[-1]
    return [
        pb.ProcessingResponse(
            response_body=_streamed(
                body[start : start + _PIECE_MAX_BYTES], end_of_stream and start == last
            )
        ).SerializeToString()
        for start in starts
    ]


def _streamed(body: bytes, end_of_stream: bool) -> pb.BodyResponse:
    piece = pb.StreamedBodyResponse(body=body, end_of_stream=end_of_stream)
    return pb.BodyResponse(
        response=pb.CommonResponse(body_mutation=pb.BodyMutation(streamed_response=piece))
    )


def immediate_response(
    status: int,
    body: bytes,
    headers: Iterable[tuple[str, str]],
    details: str,
) -> bytes:
    """An answer of this service; `details` goes into Envoy's response code details."""
    return pb.ProcessingResponse(
        immediate_response=pb.ImmediateResponse(
            status=pb.HttpStatus(code=status),
            headers=_set_headers(headers),
            body=body,
            details=details,
        )
    ).SerializeToString()


def error_response(
    error: RouterError,
    request_id: str,
    more_headers: tuple[tuple[str, str], ...] = (),
    *,
    anthropic: bool = False,
) -> bytes:
    """The error in its envelope, which is that of the OpenAI or of the Anthropic API."""
    body = error.body
    if body is None:
        enveloped = anthropic_envelope if anthropic else envelope
        body = enveloped(error.code, error.status, error.message, request_id)
    return immediate_response(
        error.status,
        body,
        (
            (CONTENT_TYPE_HEADER, "application/json"),  # the engine's own may follow
            (ERROR_CODE_HEADER, error.code),
            *error.headers,
            *more_headers,
        ),
        f"extproc_{error.code}",
    )


def attempt_reported(number: int, address: str, replica: str) -> bytes:
    """A reply to the report of an attempt; Envoy keeps the metadata for the first pass."""
    reply = pb.ProcessingResponse(response_headers=pb.HeadersResponse())
    busy = _text_struct(((str(number), f"{address} {replica}"),))
    reply.dynamic_metadata.fields[ATTEMPTS_NAMESPACE].CopyFrom(Value(struct_value=busy))
    return reply.SerializeToString()


def debug_response_headers(
    decision: Decision, worker: str, decode_worker: str | None, overlap: tuple[int, int]
) -> bytes:
    """A reply to the response headers that says which worker served, and why.

    Of a pair `worker` is the prefill worker, and `decode_worker` is given where it was picked
    together with it. `overlap` are cached and total tokens of `worker`.
    """
    pairs = [
        (WORKER_HEADER, worker),
        (POLICY_HEADER, decision.policy),
        (REASON_HEADER, decision.reason),
        (OVERLAP_HEADER, f"{overlap[0]}/{overlap[1]}"),
    ]
    if decode_worker is not None:
        pairs.append((DECODE_WORKER_HEADER, decode_worker))
    return _with_response_headers(pairs)


def debug_decode_worker(worker: str) -> bytes:
    """A reply to the response headers of the second pass that says which worker decodes."""
    return _with_response_headers(((DECODE_WORKER_HEADER, worker),))


def _with_response_headers(pairs: Iterable[tuple[str, str]]) -> bytes:
    return pb.ProcessingResponse(
        response_headers=pb.HeadersResponse(
            response=pb.CommonResponse(header_mutation=_set_headers(pairs))
        )
    ).SerializeToString()


_RETRY_AFTER: Final = _with_response_headers(((RETRY_AFTER_HEADER, str(RETRY_AFTER_SECONDS)),))


def with_retry_after(reply: bytes) -> bytes:
    """The reply to the response headers, which also says when to retry.

    Envoy (1.40) does not know "add if absent" here, so this is for responses without the header.
    """
    return reply + _RETRY_AFTER


def at_work(seconds: float) -> bytes:
    """Ask the gateway to wait for this long, in place of its own time-out of a message."""
    reply = pb.ProcessingResponse()
    reply.override_message_timeout.FromTimedelta(timedelta(seconds=seconds))
    return reply.SerializeToString()
