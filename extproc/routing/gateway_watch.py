"""Notices a gateway that sends requests elsewhere than this service decides.

A load balancer of its own, a translated address or another family of addresses in DNS makes every
decision void, while all requests succeed. So nothing that such a response says may count for or
against the chosen worker, and the operator must learn of it at once. A worker that this service
has known for a moment only may be new to the gateway: that is counted apart.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Final

import structlog

from extproc.clock import Clock
from extproc.metrics.service import Metrics
from extproc.workers.observer import WorkerObserver
from extproc.workers.registry import WorkerRegistry
from extproc.workers.worker import Worker

__all__ = ["GatewayWatch"]

_log = structlog.get_logger()

# The gateway learns new endpoints on a way of its own.
_LAG_SECONDS: Final = 5.0
_WINDOW_SECONDS: Final = 10.0
_MISSED_MIN: Final = 5
# A gateway that follows knows a worker or not. One that balances by itself hits it now and then.
_TURNS_MIN: Final = 3


class _Window:
    """What a gateway did with the requests of one model lately."""

    __slots__ = ("began_at", "ignores", "missed", "responses_before")

    def __init__(self) -> None:
        self.began_at = -math.inf
        self.responses_before = 0
        self.missed = 0
        self.ignores = False


class _Doubt:
    """A worker that the gateway passed over; `turns` is how often it then was served after all."""

    __slots__ = ("is_open", "turns")

    def __init__(self) -> None:
        self.is_open = False
        self.turns = 0


class GatewayWatch(WorkerObserver):
    """Compares what the gateway reports with the decisions, by model.

    `doubts` are by address and mostly empty: callers look at it before they call `followed`.
    """

    def __init__(
        self, clock: Clock, registry: WorkerRegistry, metrics: Metrics, models: Iterable[str]
    ) -> None:
        self._clock = clock
        self._registry = registry
        self._metrics = metrics
        self._known_since: dict[str, float] = {}
        self._windows = {model: _Window() for model in models}  # those without requests, too
        self.doubts: dict[str, _Doubt] = {}

    def watch(self, models: Iterable[str]) -> None:
        """Watch these models from now on, and no others."""
        self._windows = {model: self._windows.get(model) or _Window() for model in models}

    def workers_changed(self) -> None:
        now, before = self._clock.monotonic(), self._known_since
        addresses = [worker.address for worker in self._registry if worker.address]
        self._known_since = {address: before.get(address, now) for address in addresses}
        for address in [one for one in self.doubts if one not in self._known_since]:
            del self.doubts[address]

    def followed(self, address: str) -> None:
        """The gateway sent a request to the chosen worker, which is at this address."""
        doubt = self.doubts.get(address)
        if doubt is not None and doubt.is_open:
            doubt.is_open = False
            doubt.turns += 1

    def passed_over(self, model: str, named: Sequence[Worker], address: str) -> None:
        """The gateway served at `address` in its first attempt, and did not try those named."""
        now = self._clock.monotonic()
        settled = [worker for worker in named if not self._is_new(worker, now)]
        if named[0] not in settled:
            self._metrics.missed(model, "lag").inc()
            return
        known = self._registry.at_address(address)
        reason = "other_worker" if known is not None else "unknown_address"
        self._metrics.missed(model, reason).inc()
        window = self._windows.setdefault(model, _Window())
        self._renew(model, window, now)
        window.missed += 1
        turns = 0
        for worker in settled:
            turns = max(turns, self._doubt(worker, quiet=window.ignores))
        if not window.ignores and (turns >= _TURNS_MIN or self._most_missed(model, window)):
            window.ignores = True
            _log.error(
                "gateway_does_not_follow",
                model=model,
                worker=named[0].url,
                address=named[0].address,
                served=address,
                fix="the gateway's cluster needs the policy override_host, and endpoints at the "
                "addresses that /workers shows",
            )

    def left_the_list(self, model: str) -> None:
        """A further attempt of the gateway went to an address that was not named."""
        self._metrics.missed(model, "further_attempt").inc()

    def ignores(self, model: str) -> bool:
        """True while the gateway does not follow the decisions for this model."""
        window = self._windows.get(model)
        if window is None or not window.ignores:
            return False
        self._renew(model, window, self._clock.monotonic())
        return window.ignores

    def verdicts(self) -> dict[str, bool]:
        """Return `ignores` of every model."""
        return {model: self.ignores(model) for model in self._windows}

    def knows(self, worker: Worker) -> bool:
        """False if the gateway passed over the worker when it was last chosen."""
        doubt = self.doubts.get(worker.address or "")
        return doubt is None or not doubt.is_open

    def _is_new(self, worker: Worker, now: float) -> bool:
        return now - self._known_since.get(worker.address or "", -math.inf) < _LAG_SECONDS

    def _doubt(self, worker: Worker, *, quiet: bool) -> int:
        """Note that the worker was passed over; returns its turns."""
        address = worker.address or ""
        doubt = self.doubts.get(address)
        if doubt is None:
            doubt = self.doubts[address] = _Doubt()
            if not quiet:
                _log.warning("worker_unknown_to_gateway", worker=worker.url, address=address)
        doubt.is_open = True
        return doubt.turns

    def _most_missed(self, model: str, window: _Window) -> bool:
        missed = window.missed
        responses = self._responses(model) - window.responses_before
        return missed >= _MISSED_MIN and 2 * missed > responses

    def _renew(self, model: str, window: _Window, now: float) -> None:
        """Begin a new window if this one has lasted, and was busy enough for a verdict."""
        responses = self._responses(model)
        lasted = now - window.began_at >= _WINDOW_SECONDS
        if window.ignores:
            if not lasted or responses - window.responses_before < _MISSED_MIN:
                return
            turns = max((doubt.turns for doubt in self.doubts.values()), default=0)
            window.ignores = turns >= _TURNS_MIN or self._most_missed(model, window)
            if not window.ignores:
                _log.info("gateway_follows_again", model=model)
        elif not lasted:
            return
        window.began_at = now
        window.missed = 0
        # A response is counted before it is looked at.
        window.responses_before = responses - 1
        for address, doubt in list(self.doubts.items()):
            doubt.turns = 0
            if not doubt.is_open:
                del self.doubts[address]

    def _responses(self, model: str) -> int:
        return self._metrics.response_seconds(model).count
