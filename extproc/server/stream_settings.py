"""Deadlines of streams, and when the gateway is asked to wait longer for a decision."""

from msgspec import Struct

__all__ = ["Extension", "StreamSettings"]


class Extension(Struct, frozen=True, kw_only=True):
    """When the gateway is asked to wait, since the service is at work.

    A decision that takes longer than `after_seconds` asks it to wait for
    `message_timeout_seconds`.
    """

    after_seconds: float
    message_timeout_seconds: float


class StreamSettings(Struct, frozen=True, kw_only=True):
    """Deadlines of a stream. A decision must be there within `step_deadline_seconds` of its
    request's body, and the whole body within `body_deadline_seconds` of its first part.
    `extension` is None for gateways that wait long enough.
    """

    step_deadline_seconds: float
    body_deadline_seconds: float
    log_decisions: bool
    extension: Extension | None = None

    @property
    def first_deadline_seconds(self) -> float:
        """When a decision is looked at: to ask for more time, or to give it up."""
        extension = self.extension
        return self.step_deadline_seconds if extension is None else extension.after_seconds

    @property
    def last_deadline_seconds(self) -> float:
        """From the request for more time until the decision is given up."""
        return self.step_deadline_seconds - self.first_deadline_seconds
