"""What a subscription is given (endpoint, applier, settings) and the state it shows.

Separate from the modules that use ZMQ, so that others can name these types without it.
"""

from collections.abc import Iterator
from typing import Final, Protocol

from msgspec import Struct

from extproc.kv.rank_pages import RankPages
from extproc.kv.stats import StreamStats

__all__ = ["Applier", "EventEndpoint", "SubscriberSettings", "SubscriptionState"]

_PORT_MAX: Final = 65_535


class EventEndpoint(Struct, frozen=True):
    """Where one rank publishes; ports are the rank's own, `host` has no brackets.

    Raises ValueError for a number that is not a TCP port.
    """

    host: str
    port: int
    topic: str = ""
    replay_port: int | None = None
    load_port: int | None = None
    load_topic: str = "load"

    def __post_init__(self) -> None:
        for port in (self.port, self.replay_port, self.load_port):
            if port is not None and not 0 < port <= _PORT_MAX:
                raise ValueError(f"not a TCP port: {port}")

    def address(self, port: int) -> str:
        """The address for libzmq to connect to."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{port}"


class Applier(Protocol):
    """Applies what one rank publishes. Errors raised here are counted and logged, not passed on."""

    @property
    def pages(self) -> RankPages:
        """The rank's pages; logs take the names of worker and rank from them."""
        ...

    def apply(self, payload: bytes) -> Iterator[None] | None:
        """Apply the next batch, as it was published.

        Gives the steps if the batch is applied in steps, with rests between; nothing else is
        called before the last step. Raises, in a step too, if the batch cannot be applied: then
        the batch comes once more, or `clear` is called.
        """
        ...

    def clear(self, reason: str) -> None:
        """Forget everything applied until now: it is void."""
        ...

    def set_trusted(self, trusted: bool, reason: str) -> None:
        """Trusted: what was applied is right and up to date, if perhaps not all ("partial")."""
        ...

    def on_load(self, payload: bytes) -> None:
        """Take the engine's newest load report; older ones may be left out."""
        ...


class SubscriberSettings(Struct, frozen=True):
    """Time-outs and bounds, the same for all ranks; `reorder_…` bound the reorder buffer."""

    # A replay has failed after this time without a frame.
    replay_timeout_seconds: float = 5.0
    # The wait before a failed replay is requested again.
    replay_cool_down_seconds: float = 30.0
    replays_at_once: int = 16
    reorder_batches: int = 4096
    reorder_bytes: int = 16 << 20
    reorder_total_bytes: int = 256 << 20


class SubscriptionState(StreamStats):
    """The state of one rank's stream: counts since it was added, times monotonic."""

    connected: bool = False
    partial: bool = False
    last_event_at: float | None = None
