"""Errors a client may see, and the one envelope they all travel in.

Every error has a code that is stable, a status and a message that names no worker and
quotes nothing of the request but the model's name. The table of codes is part of the
service's contract; Envoy's own local replies are mapped to the same envelope in
envoy_config.
"""

from typing import Any, Final

import msgspec

__all__ = [
    "RETRY_AFTER_SECONDS",
    "ConfigError",
    "ErrorBody",
    "ErrorEnvelope",
    "RouterError",
    "bad_request",
    "body_required",
    "envelope",
    "internal_error",
    "method_not_allowed",
    "model_not_found",
    "no_decode_workers",
    "no_healthy_workers",
    "no_prefill_workers",
    "not_disaggregated",
    "not_found",
    "payload_too_large",
    "prefill_failed",
    "prefill_refused",
    "request_timeout",
    "routing_timeout",
    "service_overloaded",
    "stale_request_expired",
    "unsupported_body_mode",
]

# What a client is told to wait after a 503: a worker comes back within a few introspection
# or health rounds, not within milliseconds.
RETRY_AFTER_SECONDS: Final = 1

_MODEL_NAME_SHOWN_CHARS = 200


class ConfigError(Exception):
    """A configuration that can not be used; `problems` lists every `key: what is wrong`.

    `partial` is what is left of it without the broken parts, for looking further; never for
    running.
    """

    def __init__(self, problems: list[str], partial: Any = None) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
        self.partial = partial


class ErrorBody(msgspec.Struct, frozen=True):
    """The inner object of the OpenAI-style envelope."""

    type: str
    code: str
    message: str
    request_id: str = ""


class ErrorEnvelope(msgspec.Struct, frozen=True):
    """`{"error": {...}}` as clients of the OpenAI API expect it."""

    error: ErrorBody


class RouterError(Exception):
    """A request that ends here: `code` and `message` for the envelope, `status` for HTTP.

    `headers` are added to the reply (`allow` on a 405, say). `body` is an engine's own answer,
    to be passed on instead of the envelope.
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
    """The JSON body for an error: 4xx are the client's (`invalid_request_error`), else ours."""
    kind = "invalid_request_error" if 400 <= status < 500 else "server_error"
    return _encoder.encode(ErrorEnvelope(ErrorBody(kind, code, message, request_id)))


def bad_request(what: str) -> RouterError:
    """400; `what` is our own sentence, never a parser's text or a piece of the body."""
    return RouterError("bad_request", 400, f"bad request: {what}")


def body_required() -> RouterError:
    return bad_request("a JSON object is expected as the request body")


def model_not_found(model: str) -> RouterError:
    """404; the name is shortened, since a client can send a model of any length."""
    if len(model) > _MODEL_NAME_SHOWN_CHARS:
        model = model[:_MODEL_NAME_SHOWN_CHARS] + "…"
    return RouterError("model_not_found", 404, f"model not found: {model}")


def not_found() -> RouterError:
    return RouterError("not_found", 404, "no such path")


def method_not_allowed(allow: str) -> RouterError:
    return RouterError(
        "method_not_allowed", 405, "method not allowed for this path", (("allow", allow),)
    )


def payload_too_large(limit_bytes: int) -> RouterError:
    return RouterError(
        "payload_too_large", 413, f"the request body is over the limit of {limit_bytes} bytes"
    )


def request_timeout() -> RouterError:
    """408: the body did not arrive in time."""
    return RouterError("request_timeout", 408, "the request body did not arrive in time")


def no_healthy_workers() -> RouterError:
    return RouterError(
        "no_healthy_workers", 503, "no healthy workers available for the requested model"
    )


def no_prefill_workers() -> RouterError:
    """503: there are decode workers, but none that prefills."""
    return RouterError(
        "no_prefill_workers_available", 503, "no prefill workers available for the requested model"
    )


def no_decode_workers() -> RouterError:
    """503: there are prefill workers, but none that decodes."""
    return RouterError(
        "no_decode_workers_available", 503, "no decode workers available for the requested model"
    )


def not_disaggregated() -> RouterError:
    return RouterError(
        "bad_request",
        400,
        "bad request: this path is not available for a model with separate prefill and decode "
        "workers",
    )


def prefill_failed() -> RouterError:
    """502: the half of the request that the client does not see has failed."""
    return RouterError("prefill_failed", 502, "the prefill of the request failed")


def prefill_refused(
    status: int, body: bytes, headers: tuple[tuple[str, str], ...] = ()
) -> RouterError:
    """The engine's own 4xx, told by the prefill worker: the client's fault."""
    return RouterError("prefill_refused", status, "the engine refused the request", headers, body)


def routing_timeout() -> RouterError:
    """503: no decision within our own deadline; the proxy must not be the one to find out."""
    return RouterError("routing_timeout", 503, "no routing decision in time")


def service_overloaded() -> RouterError:
    """503: too much is waiting already for the same kind of work."""
    return RouterError("service_overloaded", 503, "the service is overloaded, try again later")


def unsupported_body_mode() -> RouterError:
    """503: the gateway does not show us the body before it wants a decision."""
    return RouterError(
        "body_mode_unsupported", 503, "the gateway is not configured to route by request body"
    )


def stale_request_expired() -> RouterError:
    return RouterError("stale_request_expired", 504, "request expired before completion")


def internal_error() -> RouterError:
    return RouterError("internal_error", 500, "internal error")
