"""Chooses decode workers by their load and their distance from the prefill worker.

Both passes choose from here: the first one puts decode workers in order, the second one picks
from what is left of them.
"""

from collections.abc import Sequence
from random import Random

from extproc.policies.decode_affinity import DecodeAffinity
from extproc.routing.claim import WorkerRanks
from extproc.workers.worker import Worker

__all__ = ["DecodeChooser"]


class _DecodeCandidate:
    """A decode worker beside a request; see policies.decode_affinity."""

    __slots__ = ("host", "kv_usage", "requests", "worker")

    def __init__(self, worker: Worker, requests: int, kv_usage: float) -> None:
        self.worker = worker
        self.host = worker.spec.url.host
        self.requests = requests
        self.kv_usage = kv_usage


class DecodeChooser:
    """Chooses for all models."""

    def __init__(self, ranks: WorkerRanks, random: Random) -> None:
        self._ranks = ranks
        self._affinity = DecodeAffinity(random)

    def choose(
        self, workers: Sequence[Worker], prefill_host: str, now: float
    ) -> tuple[Worker, str]:
        """Return one of at least one worker, and the reason."""
        chosen, reason = self._affinity.choose(self._candidates(workers, now), prefill_host)
        return chosen.worker, reason

    def order(self, workers: Sequence[Worker], prefill_host: str, now: float) -> list[Worker]:
        """Return all of at least one worker, the chosen one first."""
        ordered = self._affinity.order(self._candidates(workers, now), prefill_host)
        return [candidate.worker for candidate in ordered]

    def _candidates(self, workers: Sequence[Worker], now: float) -> list[_DecodeCandidate]:
        """With their load: our own requests, or what the engine reports, whichever is more."""
        candidates = []
        for worker in workers:
            loads = [rank.load for rank in self._ranks.of(worker)]
            reported = sum([load.requests(now) for load in loads])
            usage = max([load.kv_usage(now) for load in loads], default=0.0)
            candidates.append(_DecodeCandidate(worker, max(worker.in_flight, reported), usage))
        return candidates
