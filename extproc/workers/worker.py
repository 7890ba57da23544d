"""One engine as the router sees it: who it is, how it is, what it is doing."""

from typing import Literal

from msgspec import Struct

from extproc.worker_url import WorkerUrl
from extproc.workers.circuit_breaker import CircuitBreaker

__all__ = ["KvEvents", "Role", "Worker", "WorkerSpec"]

Role = Literal["plain", "prefill", "decode"]


class KvEvents(Struct, frozen=True, kw_only=True):
    """Where a worker publishes what its KV cache holds, and in which pages.

    Rank r of `dp_size` uses each port plus r. `block_size` is in tokens, with `bigram` in pairs
    of neighbours. None for a port: the engine does not offer that.
    """

    host: str
    port: int
    block_size: int
    topic: str = ""
    dp_size: int = 1
    replay_port: int | None = None
    load_port: int | None = None
    load_topic: str = "load"
    bigram: bool = False


class WorkerSpec(Struct, frozen=True, kw_only=True):
    """What discovery says of a worker; the worker's own answers are added later.

    `id` is unique among all sources: the exact URL for static workers, a pod's uid elsewhere,
    so that a new engine at an old address does not inherit the old one's breaker.
    """

    id: str
    url: WorkerUrl
    role: Role = "plain"
    model_ids: tuple[str, ...] = ()
    bootstrap_port: int | None = None
    kv_events: KvEvents | None = None


class Worker:
    """Live state of a registered worker.

    `order` rises with registration and gives policies a stable order. `address` is the
    `ip:port` by which Envoy knows it, None until its name was resolved. `in_flight` counts
    open tickets and is only changed by Tickets.
    """

    __slots__ = (
        "address",
        "breaker",
        "id",
        "in_flight",
        "model_ids",
        "order",
        "role",
        "spec",
        "url",
    )

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        order: int,
        breaker: CircuitBreaker,
        address: str | None,
    ) -> None:
        self.spec = spec
        self.id = spec.id
        self.url = str(spec.url)
        self.role: Role = spec.role
        self.model_ids = spec.model_ids
        self.order = order
        self.breaker = breaker
        self.address = address
        self.in_flight = 0

    def __repr__(self) -> str:
        return f"Worker({self.url}, {self.role}, in_flight={self.in_flight})"
