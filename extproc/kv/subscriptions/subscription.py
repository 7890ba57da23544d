"""What a subscription is given, and what it shows of itself."""

from msgspec import Struct

from extproc.kv.stats import StreamStats

__all__ = ["SubscriberSettings", "SubscriptionState"]


class SubscriberSettings(Struct, frozen=True):
    """Bounds, alike for all ranks."""

    # Without a frame for so long, a replay has failed.
    replay_timeout_seconds: float = 5.0
    # Before a failed replay is tried again.
    replay_cool_down_seconds: float = 30.0
    replays_at_once: int = 16
    held_batches: int = 4096
    held_bytes: int = 16 << 20
    held_total_bytes: int = 256 << 20


class SubscriptionState(StreamStats):
    """What is known of one rank's stream; counts since it was added, times monotonic."""

    connected: bool = False
    trusted: bool = False
    partial: bool = False
    last_event_at: float | None = None
