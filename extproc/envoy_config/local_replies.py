"""Renders Envoy's own error answers in the error envelope of this service.

Envoy's mappers also see the answers of this service (ImmediateResponse), so no mapper looks at the
status alone. Failures of workers are recognised by response flags, which an answer of this
service never has, and the rest by the detail string that Envoy gives its own replies. Responses
of workers do not pass the mappers.

Requests that the codec refuses (a malformed request line, too many headers) get no answer: Envoy
closes their connection before the filter sees them.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from extproc.envoy_config.wire_form import typed
from extproc.errors import ANTHROPIC_PATH, RETRY_AFTER_SECONDS, anthropic_error_type
from extproc.headers import ERROR_CODE_HEADER, REQUEST_ID_HEADER, RETRY_AFTER_HEADER

__all__ = [
    "ROUTER_UNAVAILABLE",
    "LocalError",
    "anthropic_format",
    "envelope_format",
    "error_headers",
    "local_replies",
]


class LocalError(NamedTuple):
    """One error that Envoy answers by itself."""

    status: int
    code: str
    message: str


ROUTER_UNAVAILABLE: Final = LocalError(
    503, "router_unavailable", "no routing decision available, try again"
)
_UNREACHABLE: Final = LocalError(503, "upstream_unreachable", "upstream unavailable")
_TIMEOUT: Final = LocalError(504, "upstream_timeout", "upstream request timed out")
_REQUEST_TIMEOUT: Final = LocalError(408, "request_timeout", "the request did not arrive in time")
_TOO_LARGE: Final = LocalError(413, "payload_too_large", "the request body is over the limit")
_OVERLOADED: Final = LocalError(503, "gateway_overloaded", "the gateway is overloaded, try again")
# Other requests that Envoy refuses by itself keep their status (400, 403, 426, 431).
_BAD_REQUEST: Final = LocalError(400, "bad_request", "bad request: refused by the gateway")
_INTERNAL: Final = LocalError(500, "internal_error", "internal error")

# Response flags, https://www.envoyproxy.io/docs/envoy/latest/configuration/observability/access_log/usage
_TIMEOUT_FLAGS: Final = ("UT", "SI")
# No connection to the worker, or no such worker: the request was not sent.
_NOT_CONNECTED_FLAGS: Final = ("UF", "UH")
_UNREACHABLE_FLAGS: Final = ("UF", "UO", "URX", "UH", "UC", "UR", "UPE", "LR", "NC", "NR")
_OVERLOAD_FLAGS: Final = ("OM",)
# Answers of this service have the header of their code already.
_NOT_OURS: Final = f'!("{ERROR_CODE_HEADER}" in response.headers)'


def local_replies(*, retry_header: str | None = None, routes: Sequence[str] = ()) -> dict[str, Any]:
    """The connection manager's `local_reply_config`. The first mapper that matches is used.

    `retry_header` is set where Envoy could not connect to the worker. With `routes`, the mappers
    are for requests of the routes of these names alone, which have no cluster without a decision.
    """
    mappers = []
    if routes:
        without_decision = _expression('response.code_details == "cluster_not_found"')
        mappers.append(_mapper(without_decision, ROUTER_UNAVAILABLE))
    if retry_header is not None:
        mapper, _ = not_connected = _mapper(_flags(_NOT_CONNECTED_FLAGS), _UNREACHABLE)
        mapper["headers_to_add"].append(
            {
                "header": {"key": retry_header, "value": "1"},
                "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
            }
        )
        mappers.append(not_connected)
    mappers += [
        _mapper(_expression('response.code_details == "request_payload_too_large"'), _TOO_LARGE),
        _mapper(
            _expression(
                'response.code_details in ["request_header_timeout", "request_overall_timeout"]'
            ),
            _REQUEST_TIMEOUT,
        ),
        _mapper(
            _expression('response.code_details.startsWith("ext_proc_error")'), ROUTER_UNAVAILABLE
        ),
        _mapper(_flags(_TIMEOUT_FLAGS), _TIMEOUT),
        _mapper(_flags(_UNREACHABLE_FLAGS), _UNREACHABLE),
        _mapper(_flags(_OVERLOAD_FLAGS), _OVERLOADED),
        # The overload manager's answers have no flag, and the status 503 or 500.
        _mapper(_expression('response.code_details == "overload"'), _OVERLOADED),
        _mapper(
            _expression(f"response.code >= 400 && response.code < 500 && {_NOT_OURS}"),
            _BAD_REQUEST,
            keep_status=True,
        ),
        # Every 503 says when to retry.
        _mapper(_expression(f"response.code == 503 && {_NOT_OURS}"), _OVERLOADED),
        _mapper(_expression(f"response.code >= 500 && {_NOT_OURS}"), _INTERNAL, keep_status=True),
    ]
    variants = [variant for mapper in mappers for variant in _by_api(*mapper)]
    if routes:
        names = ", ".join(f'"{name}"' for name in routes)
        of_routes = _expression(f"xds.route_name in [{names}]")
        variants = [{**one, "filter": _both(of_routes, one["filter"])} for one in variants]
    return {"mappers": variants}


def _both(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    return {"and_filter": {"filters": [first, second]}}


def _by_api(mapper: dict[str, Any], error: LocalError) -> list[dict[str, Any]]:
    """The mapper for requests of the Anthropic API, then the one for all others."""
    anthropic = {
        **mapper,
        "filter": _both(_ANTHROPIC_REQUEST, mapper["filter"]),
        "body_format_override": anthropic_format(error),
    }
    return [anthropic, mapper]


def anthropic_format(error: LocalError) -> dict[str, Any]:
    """The body for clients of the Anthropic API."""
    return {
        "json_format": {
            "type": "error",
            "error": {
                "type": anthropic_error_type(error.status),
                "code": error.code,
                "message": error.message,
            },
            "request_id": f"%REQ({REQUEST_ID_HEADER.upper()})%",
        },
        "content_type": "application/json",
    }


def envelope_format(error: LocalError) -> dict[str, Any]:
    """The body. Envoy fills in the request id and escapes it."""
    kind = "invalid_request_error" if 400 <= error.status < 500 else "server_error"
    return {
        "json_format": {
            "error": {
                "type": kind,
                "code": error.code,
                "message": error.message,
                "request_id": f"%REQ({REQUEST_ID_HEADER.upper()})%",
            }
        },
        "content_type": "application/json",
    }


def error_headers(error: LocalError) -> list[dict[str, Any]]:
    headers = [(ERROR_CODE_HEADER, error.code)]
    if error.status == 503:
        headers.append((RETRY_AFTER_HEADER, str(RETRY_AFTER_SECONDS)))
    return [
        {
            "header": {"key": key, "value": value},
            "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
        }
        for key, value in headers
    ]


def _flags(flags: tuple[str, ...]) -> dict[str, Any]:
    return {"response_flag_filter": {"flags": list(flags)}}


def _expression(expression: str) -> dict[str, Any]:
    """A filter in CEL, the only kind that sees the details of a reply."""
    return {
        "extension_filter": {
            "name": "envoy.access_loggers.extension_filters.cel",
            "typed_config": typed(
                "extensions.access_loggers.filters.cel.v3.ExpressionFilter", expression=expression
            ),
        }
    }


_ANTHROPIC_REQUEST: Final = _expression(f'request.url_path.startsWith("{ANTHROPIC_PATH}")')


def _mapper(
    when: dict[str, Any], error: LocalError, *, keep_status: bool = False
) -> tuple[dict[str, Any], LocalError]:
    mapper: dict[str, Any] = {"filter": when}
    if not keep_status:
        mapper["status_code"] = error.status
    mapper["headers_to_add"] = error_headers(error)
    mapper["body_format_override"] = envelope_format(error)
    return mapper, error
