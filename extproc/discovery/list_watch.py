"""Follows objects of a cluster: lists them, watches them, and lists them again at any end.

A watch can end for many reasons and then may have lost deletions. So every end is answered with a
new list, which replaces all that was known. While the API server cannot be asked, what was known
last stays in use.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from random import Random
from typing import Final, Generic, TypeVar

import structlog
from lightkube.core.resource import NamespacedResource
from msgspec import Struct

from extproc.clock import Clock
from extproc.discovery.kube_api import ApiTroubleError, ObjectApi, WatchEndedError, WatchEvent
from extproc.metrics.service import DiscoveryMetrics
from extproc.workers.source_health import SourceHealth

__all__ = ["ListWatch", "Snapshot"]

_log = structlog.get_logger()

_KindT = TypeVar("_KindT", bound=NamespacedResource)

# A server that ends each watch at once is not asked more often than this.
_CYCLE_MIN_SECONDS: Final = 1.0
_BACKOFF_FIRST_SECONDS: Final = 0.5
_BACKOFF_MAX_SECONDS: Final = 30.0
_RETRY_AFTER_MAX_SECONDS: Final = 60.0
# Enough doublings to reach the longest wait.
_DOUBLINGS_MAX: Final = 6
# A watch that has lasted for this long shows that the server works.
_GOOD_WATCH_SECONDS: Final = 10.0
_WARNING_INTERVAL_SECONDS: Final = 60.0


class Snapshot(Struct, Generic[_KindT], frozen=True):
    """All objects; others that were known are gone."""

    objects: list[_KindT]


class ListWatch(Generic[_KindT]):
    """Objects of one kind; `what` names them in logs and metrics, for example `endpointslices`."""

    def __init__(
        self,
        api: ObjectApi[_KindT],
        what: str,
        *,
        clock: Clock,
        random: Random,
        metrics: DiscoveryMetrics,
        health: SourceHealth,
    ) -> None:
        self._api = api
        self._what = what
        self._clock = clock
        self._random = random
        self._up = metrics.up(what)
        self._up.set(0)
        self._errors = metrics.errors
        self._health = health
        self._failures = 0
        self._failing_since: float | None = None
        self._warned: tuple[str, float] | None = None

    async def follow(self) -> AsyncGenerator[Snapshot[_KindT] | WatchEvent[_KindT], None]:
        """Snapshots and the events after each, for ever; errors are logged and counted."""
        try:
            while True:
                began_at = self._clock.monotonic()
                trouble: ApiTroubleError | None = None
                try:
                    objects, version = await self._api.list()
                    self._listed()
                    yield Snapshot(objects)
                    async with aclosing(self._api.watch(version)) as events:
                        async for event in events:
                            if event.type != "BOOKMARK":
                                yield event
                except WatchEndedError:
                    pass
                except ApiTroubleError as error:
                    trouble = error
                lasted = self._clock.monotonic() - began_at
                await self._clock.sleep(self._pause_seconds(trouble, lasted))
        finally:
            self._health.forget(self._what)
            await self._api.close()

    def _pause_seconds(self, trouble: ApiTroubleError | None, lasted_seconds: float) -> float:
        """How long to wait before the next list; notes the trouble."""
        if lasted_seconds >= _GOOD_WATCH_SECONDS:
            self._failures = 0
        shortest = max(0.0, _CYCLE_MIN_SECONDS - lasted_seconds)
        if trouble is None:
            return shortest
        self._errors(self._what, trouble.reason).inc()
        if trouble.reason == "expired":
            return shortest  # The server works; it has only forgotten the version.
        self._failed(trouble)
        doublings = min(self._failures, _DOUBLINGS_MAX)
        self._failures += 1
        longest: float = min(_BACKOFF_FIRST_SECONDS * 2**doublings, _BACKOFF_MAX_SECONDS)
        # Replicas that lost the same server do not come back together.
        backoff = longest * (0.5 + self._random.random() / 2)
        asked = min(trouble.retry_after_seconds, _RETRY_AFTER_MAX_SECONDS)
        return max(backoff, asked)

    def _listed(self) -> None:
        self._up.set(1)
        self._health.works(self._what)
        if self._failing_since is not None:
            now = self._clock.monotonic()
            if self._warned is not None and self._warned[1] >= self._failing_since:
                _log.info(
                    "discovery_recovered",
                    objects=self._what,
                    seconds=round(now - self._failing_since, 1),
                )
            self._failing_since = None

    def _failed(self, trouble: ApiTroubleError) -> None:
        """Count it, and warn once a minute or for a new reason."""
        now = self._clock.monotonic()
        self._up.set(0)
        self._health.fails(self._what, trouble.reason, now)
        if self._failing_since is None:
            self._failing_since = now
        if self._warned is not None:
            reason, at = self._warned
            if reason == trouble.reason and now - at < _WARNING_INTERVAL_SECONDS:
                return
        self._warned = (trouble.reason, now)
        _log.warning(
            "discovery_failing",
            objects=self._what,
            reason=trouble.reason,
            error=trouble.detail,
            fix=_FIXES.get(trouble.reason, "check the API server; the known workers stay in use"),
        )


_FIXES: Final = {
    "forbidden": "allow this service account to list and watch, see docs/kubernetes.md",
    "unauthorized": "check the token of this service account",
    "unreachable": "check the address of the API server and the network policy",
}
