"""Says which endpoints the Envoys know, from what their streams have acknowledged.

An Envoy that is given an unknown destination sends the request elsewhere, so a new worker waits
until all have it. Some may have their endpoints from another replica, which sees the same workers
a moment sooner or later: so it waits for a moment in any case. An endpoint that is known stays
known while it is served: an Envoy that connects again still has it, and a new one gets no requests
before it has its endpoints.
"""

from collections.abc import Collection, Mapping

from extproc.xds.client import Client
from extproc.xds.session import Resource

__all__ = ["Gate"]


class Gate:
    """Which addresses may be chosen."""

    def __init__(self, settle_seconds: float) -> None:
        """`settle_seconds` is the shortest wait, for Envoys with streams to other replicas."""
        self._settle_seconds = settle_seconds
        # By cluster and address: since when it is served.
        self._since: dict[tuple[str, str], float] = {}
        self._known: set[tuple[str, str]] = set()

    def look(
        self, endpoints: Mapping[str, Resource], clients: Collection[Client], now: float
    ) -> tuple[dict[str, frozenset[str]], float | None]:
        """The known addresses by cluster, and the seconds until time alone adds another one."""
        served = {(name, one) for name, found in endpoints.items() for one in found.addresses}
        self._since = {pair: self._since.get(pair, now) for pair in served}
        self._known &= served
        waits: list[float] = []
        for pair in served - self._known:
            name, address = pair
            wait = self._since[pair] + self._settle_seconds - now
            if wait > 0:
                waits.append(wait)
            elif all(one.has(name, address) for one in clients if one.asks_for(name)):
                self._known.add(pair)
        known: dict[str, set[str]] = {name: set() for name in endpoints}
        for name, address in self._known:
            known[name].add(address)
        return {name: frozenset(some) for name, some in known.items()}, min(waits, default=None)
