"""Whether discovery can be asked, by the kind of object that is followed.

Written by the backends and read by the admin pages: while a backend fails, the workers known last
stay in use, and operators must see that they may be out of date.
"""

from typing import Any

from msgspec import Struct

__all__ = ["SourceHealth"]


class _Failure(Struct, frozen=True):
    reason: str
    since: float


class SourceHealth:
    """What fails now, and since when."""

    def __init__(self) -> None:
        self._failures: dict[str, _Failure | None] = {}

    @property
    def is_stale(self) -> bool:
        """True while a kind of object cannot be listed or watched."""
        return any(self._failures.values())

    def works(self, objects: str) -> None:
        """Objects of this kind were listed."""
        self._failures[objects] = None

    def fails(self, objects: str, reason: str, now: float) -> None:
        """They cannot be listed or watched; `reason` as in extproc_discovery_errors_total."""
        before = self._failures.get(objects)
        self._failures[objects] = _Failure(reason, now if before is None else before.since)

    def forget(self, objects: str) -> None:
        """They are not followed any more."""
        self._failures.pop(objects, None)

    def show(self, now: float) -> list[dict[str, Any]]:
        """As `/workers` shows it; times in seconds."""
        return [
            {
                "objects": objects,
                "failing_seconds": None if failure is None else round(now - failure.since, 1),
                "reason": None if failure is None else failure.reason,
            }
            for objects, failure in self._failures.items()
        ]
