"""Remembers when each model was last asked for, also if no worker could serve it.

Of a model without workers nothing else shows that clients want it.
"""

import math

__all__ = ["Demand"]


class Demand:
    """The models are configured ones, so there are few."""

    def __init__(self) -> None:
        self._asked_at: dict[str, float] = {}

    def asked(self, model: str, now: float) -> None:
        """A client asks for the model; `now` in monotonic seconds."""
        self._asked_at[model] = now

    def seconds_since(self, model: str, now: float) -> float:
        """The time since a client asked for the model; infinite before the first one."""
        return now - self._asked_at.get(model, -math.inf)
