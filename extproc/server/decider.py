"""The part of the router that streams ask."""

from typing import Protocol

from extproc.routing.lease import Lease
from extproc.routing.local_endpoints import Answer
from extproc.routing.pd.decode_order import DecodeQuery
from extproc.routing.pd.pair import Pair
from extproc.routing.request import Request

__all__ = ["Decider"]


class Decider(Protocol):
    """Every call may raise RouterError."""

    async def route(self, request: Request) -> Lease | Pair:
        """Decide where a request goes."""

    async def answer(self, request: Request) -> Answer:
        """Answer a request to an endpoint that needs no worker."""

    def pick_decode(self, query: DecodeQuery) -> Lease:
        """Pick the decode worker for an attempt of the second pass."""

    def answered_busy(self, address: str, retry_after_seconds: float | None) -> bool:
        """The worker at this address has answered 503 or 429; True if that is recorded now."""
