"""The one error a handler raises, and the envelope it travels in."""

from typing import Any

__all__ = ["ApiError", "error_body"]


class ApiError(Exception):
    """A request that ends in an error answer of `status`; `headers` are added to it."""

    def __init__(self, status: int, message: str, *, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = headers or {}


_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(status: int, message: str) -> dict[str, Any]:
    """The envelope of the OpenAI API."""
    default = "invalid_request_error" if status < 500 else "server_error"
    kind = _KINDS.get(status, default)
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}
