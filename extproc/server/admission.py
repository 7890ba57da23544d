"""Limits how many requests this service has at once, and how many bytes of their bodies it holds.

A request is refused at its headers, before its body is read and any work is done: the gateway
then need not buffer the body either. Sessions ask, and streams give back when a request ends.
Separate from the session because all sessions share the counts, also those of an earlier
configuration.
"""

from typing import Final

from msgspec import Struct

from extproc.config.section import MEBIBYTE
from extproc.errors import service_overloaded

__all__ = ["Admission", "AdmissionLimits"]

# Clients that announce large bodies and send them slowly can fill their share of the bytes.
# The rest is for small bodies, which nearly all requests have.
_SMALL_BYTES: Final = MEBIBYTE
_LARGE_SHARE: Final = 0.75


class AdmissionLimits(Struct, frozen=True, kw_only=True):
    """`max_buffered_bytes` is for all bodies together."""

    max_requests: int
    max_buffered_bytes: int


class Admission:
    """Counts of one service. Others only read them, and replace `limits`.

    `refused_requests` and `refused_bytes` count refusals by the limit that was reached.
    """

    __slots__ = ("buffered_bytes", "limits", "refused_bytes", "refused_requests", "requests")

    def __init__(self, limits: AdmissionLimits) -> None:
        self.limits = limits
        self.requests = 0
        self.buffered_bytes = 0
        self.refused_requests = 0
        self.refused_bytes = 0

    def enter(self, body_bytes: int) -> None:
        """Count one more request that holds this much; raises RouterError 503 over a limit."""
        if self.requests >= self.limits.max_requests:
            self.refused_requests += 1
            raise service_overloaded()
        if body_bytes:
            self.hold(body_bytes, body_bytes)
        self.requests += 1

    def hold(self, more_bytes: int, body_bytes: int) -> None:
        """Count more bytes of a body, which has `body_bytes` with them.

        Raises RouterError 503 over the limit, and then counts nothing.
        """
        limit: float = self.limits.max_buffered_bytes
        if body_bytes > _SMALL_BYTES:
            limit *= _LARGE_SHARE
        if self.buffered_bytes + more_bytes > limit:
            self.refused_bytes += 1
            raise service_overloaded()
        self.buffered_bytes += more_bytes

    def give_back(self, body_bytes: int) -> None:
        """These bytes of a body have been passed on or dropped."""
        self.buffered_bytes -= body_bytes

    def leave(self, body_bytes: int) -> None:
        """A request that entered is over, and these bytes are still held."""
        self.requests -= 1
        self.buffered_bytes -= body_bytes
