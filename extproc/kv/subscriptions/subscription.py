"""What a subscription is given, and what it shows of itself."""

from collections.abc import Iterator
from typing import Final, Protocol

from msgspec import Struct

from extproc.kv.rank_pages import RankPages
from extproc.kv.stats import StreamStats

__all__ = ["Applier", "EventEndpoint", "SubscriberSettings", "SubscriptionState"]

_PORT_MAX: Final = 65_535


class EventEndpoint(Struct, frozen=True):
    """Where one rank publishes; ports are the rank's own, `host` without brackets.

    Raises ValueError for a port that is none.
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
        """In the form libzmq connects to."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{port}"


class Applier(Protocol):
    """Takes what one rank's event stream brings. What these raise is counted, not passed on."""

    @property
    def pages(self) -> RankPages:
        """The pages of the rank; logs name the rank by them."""
        ...

    def apply(self, payload: bytes) -> Iterator[None] | None:
        """Apply the next batch, as it was published.

        If it is taken in step by step, with rests between, the steps; nothing else is called
        before the last of them. Raises, in a step too, when the batch cannot be used: then it
        is given once more, or what was applied until now is cleared.
        """
        ...

    def clear(self, reason: str) -> None:
        """Forget what was applied until now: it no longer holds."""
        ...

    def set_trusted(self, trusted: bool, reason: str) -> None:
        """Trusted: what was applied holds, if not all ("partial"), and is kept up to date."""
        ...

    def on_load(self, payload: bytes) -> None:
        """Take the engine's newest load report; older ones are left out."""
        ...


class SubscriberSettings(Struct, frozen=True):
    """Bounds, alike for all ranks."""

    # Without a frame for so long, a replay has failed.
    replay_timeout_seconds: float = 5.0
    # Before a failed replay is tried again.
    replay_cool_down_seconds: float = 30.0
    replays_at_once: int = 16
    reorder_batches: int = 4096
    reorder_bytes: int = 16 << 20
    reorder_total_bytes: int = 256 << 20


class SubscriptionState(StreamStats):
    """What is known of one rank's stream; counts since it was added, times monotonic."""

    connected: bool = False
    partial: bool = False
    last_event_at: float | None = None
