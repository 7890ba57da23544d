"""Says which endpoints the Envoys know, from what their streams have acknowledged.

An Envoy that is given an unknown destination sends the request elsewhere, so a new worker waits
until all have it. Some may have their endpoints from another replica, which sees the same workers
a moment sooner or later: so it waits for a moment in any case. An endpoint that is known stays
known while it is served: an Envoy that connects again still has it, and a new one gets no requests
before it has its endpoints.
"""

from collections.abc import Collection, Mapping

from extproc.xds.session import Resource, Session

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
        self, snapshot: Mapping[str, Resource], sessions: Collection[Session], now: float
    ) -> tuple[frozenset[str], float | None]:
        """The known addresses, and the seconds until time alone makes another one known."""
        served = {(name, one) for name, resource in snapshot.items() for one in resource.addresses}
        self._since = {pair: self._since.get(pair, now) for pair in served}
        self._known &= served
        waits: list[float] = []
        for pair in served - self._known:
            name, address = pair
            asking = [one for one in sessions if one.subscribes_to(name)]
            wait = self._since[pair] + self._settle_seconds - now
            if wait > 0:
                waits.append(wait)
            elif all(_has(one, name, address) for one in asking):
                self._known.add(pair)
        unknown = {address for _, address in served - self._known}
        known = frozenset(address for _, address in self._known) - unknown
        return known, min(waits, default=None)


def _has(session: Session, name: str, address: str) -> bool:
    resource = session.acknowledged.get(name)
    return resource is not None and address in resource.addresses
