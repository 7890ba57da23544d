"""The endpoints among which a gateway can send a request, where it says so.

In the endpoint picker protocol a gateway may name a subset of its pool with a request: what its
own filters have left. An endpoint outside of it would not be served, so it must not be chosen.
"""

from collections.abc import Iterable
from typing import Final

from msgspec import Struct

from extproc.workers.worker import Worker

__all__ = ["Subset", "workers_in"]

_PORT: Final = ":"


class Subset(Struct, frozen=True):
    """Endpoints as `ip:port`. One without a port stands for all ports of its address."""

    endpoints: frozenset[str]

    @classmethod
    def of(cls, names: Iterable[str]) -> "Subset":
        return cls(frozenset(name.strip() for name in names) - {""})

    def has(self, address: str) -> bool:
        """True if the gateway can send to this `ip:port`; an IPv6 address is in brackets."""
        if address in self.endpoints:
            return True
        host = address.rpartition(_PORT)[0]
        return host in self.endpoints or host.strip("[]") in self.endpoints


def workers_in(subset: Subset | None, workers: list[Worker]) -> list[Worker]:
    """The workers that the gateway can reach; all of them where it names no subset."""
    if subset is None:
        return workers
    return [worker for worker in workers if worker.address and subset.has(worker.address)]
