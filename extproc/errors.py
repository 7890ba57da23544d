"""The errors of this service: what a client may see, and what stays inside.

    Exception
    ├── RouterError                          a reply to a client; made by the functions below
    └── ServiceError                         never reaches a client as it is
        ├── ConfigError                      the configuration cannot be used
        ├── WireError                        (kv.events) a KV message cannot be decoded
        ├── TokenizerError                   (tokenization) a tokenizer cannot be loaded
        ├── TextTooLongError                 (tokenization)
        ├── UnknownTokenError                (tokenization)
        ├── EncodeFailedError                (tokenization)
        ├── EncoderBusyError                 (tokenization)
        ├── UnmappableError                  (tokenization) a request has no tokens, and the reason
        ├── TemplateLimitError               (tokenization) a chat template takes too many steps
        ├── EngineUnreachableError           (workers) an engine gave no complete HTTP answer
        │   └── EngineTimeoutError           (workers)
        ├── PrefillClientOverloadedError     (workers) no file descriptor for a connection
        ├── MixedRolesError                  (workers) a role does not fit the other workers
        ├── RuntimeWorkerError               (workers) a worker cannot be added or removed
        ├── LookupFailedError                (discovery) the addresses of a name are unknown
        ├── ApiTroubleError                  (discovery) the API server did not answer well
        ├── WatchEndedError                  (discovery) a watch has ended without an error
        ├── StreamLimitError                 (xds) a client asks for too much on an ADS stream
        ├── BodyTooLargeError                (server)
        ├── AdminError                       (admin) a running service cannot be asked for tokens
        ├── NoTokensToldError                (workers) an engine does not say its tokens
        ├── NotNowError                      (routing) a worker is not to be asked at the moment
        └── StackError                       (testing) a process of the test stack failed

Every RouterError has a code that is stable, a status, and a message that names no worker and
quotes nothing of the request but the names of the model and of the content encoding.
`docs/errors.md` lists the codes; they are part of the service's contract. Envoy's own local replies
get the same envelope in `envoy_config`.
"""

from typing import Any, Final

import msgspec

__all__ = [
    "ANTHROPIC_PATH",
    "RETRY_AFTER_SECONDS",
    "ConfigError",
    "ErrorBody",
    "ErrorEnvelope",
    "RouterError",
    "ServiceError",
    "anthropic_envelope",
    "anthropic_error_type",
    "bad_request",
    "body_over_gateway_buffer",
    "body_required",
    "envelope",
    "internal_error",
    "is_anthropic",
    "method_not_allowed",
    "model_not_found",
    "model_overloaded",
    "no_decode_workers",
    "no_healthy_workers",
    "no_prefill_workers",
    "no_tokenizer",
    "no_workers_in_subset",
    "no_workers_with_adapter",
    "not_disaggregated",
    "not_found",
    "payload_too_large",
    "prefill_failed",
    "prefill_refused",
    "request_timeout",
    "retry_after_seconds",
    "routing_timeout",
    "service_overloaded",
    "stale_request_expired",
    "unsupported_body_mode",
    "unsupported_content_encoding",
]

# The `retry-after` of a 503: a worker comes back within a few introspections or health checks,
# not within milliseconds.
RETRY_AFTER_SECONDS: Final = 1
_RETRY_AFTER_MAX_CHARS: Final = 12

# Anthropic's API: /v1/messages, and the paths below it.
ANTHROPIC_PATH: Final = "/v1/messages"
_ANTHROPIC_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}

_MODEL_NAME_SHOWN_CHARS = 200
_ENCODING_SHOWN_CHARS = 40


class ServiceError(Exception):
    """Base of the exceptions that stay inside the service."""


class ConfigError(ServiceError):
    """A configuration that cannot be used; `problems` lists each problem as `key: sentence`.

    `partial` is the configuration without its broken parts. It serves for further checks, never
    for running.
    """

    def __init__(self, problems: list[str], partial: Any = None) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
        self.partial = partial


class ErrorBody(msgspec.Struct, frozen=True):
    """The inner object of the envelope."""

    type: str
    code: str
    message: str
    request_id: str = ""


class ErrorEnvelope(msgspec.Struct, frozen=True):
    """`{"error": {...}}`, as clients of the OpenAI API expect it."""

    error: ErrorBody


class _AnthropicBody(msgspec.Struct, frozen=True):
    type: str
    code: str
    message: str


class _AnthropicEnvelope(msgspec.Struct, frozen=True):
    """`{"type": "error", "error": {...}}`, as clients of the Anthropic API expect it."""

    type: str
    error: _AnthropicBody
    request_id: str


class RouterError(Exception):
    """Ends a request: `code` and `message` go into the envelope, `status` is the HTTP status.

    `headers` are added to the reply (`allow` on a 405, for instance). `body` is an engine's own
    answer, which replaces the envelope.
    """

    def __init__(
        self,
        code: str,
        status: int,
        message: str,
        headers: tuple[tuple[str, str], ...] = (),
        body: bytes | None = None,
    ) -> None:
        super().__init__(code)
        self.body = body
        self.code = code
        self.status = status
        self.message = message
        if status == 503:
            headers = (("retry-after", str(RETRY_AFTER_SECONDS)), *headers)
        self.headers = headers


_encoder = msgspec.json.Encoder()


def envelope(code: str, status: int, message: Any, request_id: str = "") -> bytes:
    """The JSON body of an error reply; `type` is `invalid_request_error` for a 4xx."""
    kind = "invalid_request_error" if 400 <= status < 500 else "server_error"
    return _encoder.encode(ErrorEnvelope(ErrorBody(kind, code, message, request_id)))


def is_anthropic(path: str) -> bool:
    """True for a path, with or without a query, whose clients expect errors of Anthropic's API."""
    return path.startswith(ANTHROPIC_PATH)


def anthropic_error_type(status: int) -> str:
    """The `type` of an error, from https://docs.anthropic.com/en/api/errors."""
    if status in _ANTHROPIC_TYPES:
        return _ANTHROPIC_TYPES[status]
    return "invalid_request_error" if 400 <= status < 500 else "api_error"


def anthropic_envelope(code: str, status: int, message: Any, request_id: str = "") -> bytes:
    """The JSON body of an error reply to a client of the Anthropic API."""
    body = _AnthropicBody(anthropic_error_type(status), code, message)
    return _encoder.encode(_AnthropicEnvelope("error", body, request_id))


def bad_request(what: str) -> RouterError:
    """400; `what` is a sentence of this service, never a parser's text or a part of the body."""
    return RouterError("bad_request", 400, f"bad request: {what}")


def body_required() -> RouterError:
    """400: the body is missing or is no JSON object."""
    return bad_request("a JSON object is expected as the request body")


def not_disaggregated() -> RouterError:
    """400: the path cannot be served by a pair of workers."""
    return bad_request(
        "this path is not available for a model with separate prefill and decode workers"
    )


def model_not_found(model: str) -> RouterError:
    """404; a long name is shortened, because a client can send a name of any length."""
    if len(model) > _MODEL_NAME_SHOWN_CHARS:
        model = model[:_MODEL_NAME_SHOWN_CHARS] + "…"
    return RouterError("model_not_found", 404, f"model not found: {model}")


def not_found() -> RouterError:
    """404: the path is not served."""
    return RouterError("not_found", 404, "no such path")


def no_tokenizer(model: str) -> RouterError:
    """404: the model has no `tokenizer_path`."""
    return RouterError(
        "tokenizer_not_configured", 404, f"no tokenizer is configured for the model {model}"
    )


def method_not_allowed(allow: str) -> RouterError:
    """405; `allow` lists the allowed methods."""
    return RouterError(
        "method_not_allowed", 405, "method not allowed for this path", (("allow", allow),)
    )


def request_timeout() -> RouterError:
    """408: the body did not arrive in time."""
    return RouterError("request_timeout", 408, "the request body did not arrive in time")


def payload_too_large(limit_bytes: int) -> RouterError:
    """413: the body is larger than this service accepts."""
    return RouterError(
        "payload_too_large", 413, f"the request body is over the limit of {limit_bytes} bytes"
    )


def body_over_gateway_buffer() -> RouterError:
    """413: the gateway sent only the beginning of the body."""
    return RouterError(
        "payload_too_large", 413, "the request body does not fit the gateway's buffer"
    )


def unsupported_content_encoding(encoding: str) -> RouterError:
    """415; a client can send any text as the encoding, so it is named in part."""
    shown = "".join(one for one in encoding if one.isalnum() or one in ", -_.")
    return RouterError(
        "unsupported_content_encoding",
        415,
        f"the content encoding {shown[:_ENCODING_SHOWN_CHARS]} is not decoded here",
        (("accept-encoding", "identity"),),
    )


def internal_error() -> RouterError:
    """500: a fault of this service."""
    return RouterError("internal_error", 500, "internal error")


def prefill_failed() -> RouterError:
    """502: the prefill worker failed."""
    return RouterError("prefill_failed", 502, "the prefill of the request failed")


def prefill_refused(
    status: int, body: bytes, headers: tuple[tuple[str, str], ...] = ()
) -> RouterError:
    """4xx: the prefill worker's own answer to a request that is at fault."""
    return RouterError("prefill_refused", status, "the engine refused the request", headers, body)


def no_healthy_workers() -> RouterError:
    """503: the model has no worker that may be tried."""
    return RouterError(
        "no_healthy_workers", 503, "no healthy workers available for the requested model"
    )


def no_workers_with_adapter() -> RouterError:
    """503: the adapter is known, and no worker that may be tried has loaded it now."""
    return RouterError(
        "no_workers_with_adapter",
        503,
        "no available worker has loaded the requested adapter, try again later",
    )


def no_workers_in_subset() -> RouterError:
    """503: no worker that may be tried is among the endpoints that the gateway names."""
    return RouterError(
        "no_workers_in_subset", 503, "no available worker is among the gateway's endpoints"
    )


def no_prefill_workers() -> RouterError:
    """503: the model has decode workers, but no prefill worker."""
    return RouterError(
        "no_prefill_workers_available", 503, "no prefill workers available for the requested model"
    )


def no_decode_workers() -> RouterError:
    """503: the model has prefill workers, but no decode worker."""
    return RouterError(
        "no_decode_workers_available", 503, "no decode workers available for the requested model"
    )


def routing_timeout() -> RouterError:
    """503: no decision within this service's deadline, which ends before the gateway's."""
    return RouterError("routing_timeout", 503, "no routing decision in time")


def service_overloaded() -> RouterError:
    """503: too many requests wait for the same kind of work."""
    return RouterError("service_overloaded", 503, "the service is overloaded, try again later")


def model_overloaded() -> RouterError:
    """503: all workers of the model are full, and the request cannot wait, or has waited."""
    return RouterError(
        "model_overloaded", 503, "all workers of the model are busy, try again later"
    )


def unsupported_body_mode() -> RouterError:
    """503: the gateway does not send the body before it needs a decision."""
    return RouterError(
        "body_mode_unsupported", 503, "the gateway is not configured to route by request body"
    )


def stale_request_expired() -> RouterError:
    """504: the request is older than `active_load.stale_request_timeout_secs`."""
    return RouterError("stale_request_expired", 504, "request expired before completion")


def retry_after_seconds(value: str) -> float | None:
    """Read the header `retry-after`; None for a date, which engines do not send, and for junk."""
    value = value.strip()
    if (
        len(value) > _RETRY_AFTER_MAX_CHARS
        or not value.isascii()
        or not value.replace(".", "", 1).isdigit()
    ):
        return None
    return float(value)
