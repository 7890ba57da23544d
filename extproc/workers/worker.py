"""One engine as the router sees it: its identity, its breaker and its load."""

from typing import Literal

from msgspec import Struct

from extproc.engines.engine import Engine, EngineName, engine_named
from extproc.worker_url import WorkerUrl
from extproc.workers.circuit_breaker import CircuitBreaker
from extproc.workers.pace import Pace

__all__ = ["KvEvents", "Role", "Worker", "WorkerSpec", "configured_spec"]

Role = Literal["plain", "prefill", "decode"]


class KvEvents(Struct, frozen=True, kw_only=True):
    """Where a worker publishes its KV events, and the size of its pages.

    Rank r of `dp_size` ranks uses each port plus r. A port is None if the engine does not offer
    that service. `block_size` is in tokens, or with `bigram` in pairs of neighbouring tokens.
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
    """What discovery says about a worker; the worker's own answers are added later.

    `id` is unique: the URL for static workers, for example the uid of a pod for others, so that
    a new engine at an old address does not inherit the breaker of the old one.
    `role_is_configured` is set where the configuration names the role, whatever the worker says.
    `engine` is None until the worker has said it, and `engine_version` and
    `reasoning_parser` are then empty.
    `adapters` are the names of the LoRA adapters that it has loaded, and `lists_adapters` is set
    if it may load others while it runs.
    `rank_hosts` are ranks and the addresses at which they publish KV events, where discovery
    knows them: other ranks are then not followed.
    """

    id: str
    url: WorkerUrl
    role: Role = "plain"
    model_ids: tuple[str, ...] = ()
    bootstrap_port: int | None = None
    kv_events: KvEvents | None = None
    role_is_configured: bool = False
    rank_hosts: tuple[tuple[int, str], ...] = ()
    engine: EngineName | None = None
    engine_version: str = ""
    reasoning_parser: str = ""
    adapters: tuple[str, ...] = ()
    lists_adapters: bool = False


def configured_spec(url: WorkerUrl, role: Role | None) -> WorkerSpec:
    """A worker that is known by its URL; without a role, the engine says it."""
    return WorkerSpec(
        id=str(url), url=url, role=role or "plain", role_is_configured=role is not None
    )


class Worker:
    """The state of a registered worker.

    `order` rises with registration and gives policies a stable order. `address` is the
    `ip:port` by which Envoy knows the worker, None until its host name is resolved. The name's
    further addresses get no requests. `in_flight` counts open tickets; only Tickets change it and
    `pace`. One that is `draining` gets no new requests, and one that is `vanished` is held although
    discovery does not name it.
    """

    __slots__ = (
        "adapters",
        "address",
        "breaker",
        "draining",
        "id",
        "in_flight",
        "model_ids",
        "order",
        "pace",
        "role",
        "spec",
        "unused_addresses",
        "url",
        "vanished",
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
        self.adapters = frozenset(spec.adapters)
        self.order = order
        self.breaker = breaker
        self.address = address
        self.unused_addresses: tuple[str, ...] = ()
        self.draining = False
        self.vanished = False
        self.in_flight = 0
        self.pace = Pace()

    @property
    def engine(self) -> Engine:
        """The engine as it is in the worker's version."""
        spec = self.spec
        return engine_named(spec.engine, spec.engine_version, spec.reasoning_parser)

    def __repr__(self) -> str:
        return f"Worker({self.url}, {self.role}, in_flight={self.in_flight})"
