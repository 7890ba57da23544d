"""The results of a session: replies to Envoy, and facts to count, to log and to settle.

A session returns a Step, and the stream carries it out. So a test compares the consequences of a
message without metrics, logs or a router.
"""

from collections.abc import Mapping, Sequence
from typing import Final, Literal, NamedTuple, TypeAlias

from msgspec import Struct

from extproc.server import replies
from extproc.server.messages import Response

__all__ = [
    "NOTHING",
    "RELEASED",
    "REQUEST_BODY_CONTINUE",
    "REQUEST_HEADERS_CONTINUE",
    "REQUEST_TRAILERS_CONTINUE",
    "RESPONSE_BODY_CONTINUE",
    "RESPONSE_BODY_END",
    "RESPONSE_HEADERS_CONTINUE",
    "RESPONSE_TRAILERS_END",
    "LogEvent",
    "Step",
    "log_event",
]


_Level: TypeAlias = Literal["info", "warning", "error"]


class LogEvent(NamedTuple):
    """One line to log."""

    level: _Level
    event: str
    fields: Mapping[str, object]


def log_event(level: _Level, event: str, **fields: object) -> LogEvent:
    """A line to log, without the fields that are None."""
    return LogEvent(
        level, event, {key: value for key, value in fields.items() if value is not None}
    )


class Step(Struct, frozen=True, kw_only=True, gc=False):
    """The result of one message or event.

    `replies`: serialised, in the order in which Envoy gets them.
    `path`, `code`: this service's part of the request has ended: "routed", "answered" or the code
    of an error, on an API path. `code` is "" while it goes on.
    `body_bytes`: the size of the request body, once it is complete.
    `events`: to log.
    `response`: the response headers, by which the lease is settled.
    `released`: the response has ended, or no response will come: the lease is closed.
    """

    replies: Sequence[bytes] = ()
    path: str = ""
    code: str = ""
    body_bytes: int | None = None
    events: tuple[LogEvent, ...] = ()
    response: Response | None = None
    released: bool = False


# The frequent steps, made once.
NOTHING: Final = Step()
RELEASED: Final = Step(released=True)
REQUEST_HEADERS_CONTINUE: Final = Step(replies=(replies.REQUEST_HEADERS_CONTINUE,))
REQUEST_BODY_CONTINUE: Final = Step(replies=(replies.REQUEST_BODY_CONTINUE,))
REQUEST_TRAILERS_CONTINUE: Final = Step(replies=(replies.REQUEST_TRAILERS_CONTINUE,))
RESPONSE_HEADERS_CONTINUE: Final = Step(replies=(replies.RESPONSE_HEADERS_CONTINUE,))
RESPONSE_BODY_CONTINUE: Final = Step(replies=(replies.RESPONSE_BODY_CONTINUE,))
RESPONSE_BODY_END: Final = Step(replies=(replies.RESPONSE_BODY_CONTINUE,), released=True)
RESPONSE_TRAILERS_END: Final = Step(replies=(replies.RESPONSE_TRAILERS_CONTINUE,), released=True)
