"""The ranks of registered workers: what each holds, what it has to do, whether to believe it.

Workers come and go with discovery; from here on their ranks are what KV-aware policies choose. A
rank is followed only while its worker is registered: its sockets are closed before what it
held is dropped, so that nothing that arrives late can be taken for something it holds.
"""

import asyncio
from collections.abc import Hashable, Iterator
from typing import NamedTuple, Self

import structlog

from extproc.clock import Clock
from extproc.kv.indexer import KvIndexer, RankSource
from extproc.kv.subscriptions.subscriber import EventEndpoint, SubscriberSettings
from extproc.kv.wire import LoadStat
from extproc.routing.placement import Placement
from extproc.routing.rank import Rank
from extproc.workers.rank_load import RankLoad
from extproc.workers.worker import KvEvents, Worker

__all__ = ["RankKey", "Ranks"]

_log = structlog.get_logger()


class RankKey(NamedTuple):
    """A holder's name; two workers with one URL, while a pod is replaced, are told apart."""

    worker_id: str
    url: str
    dp_rank: int

    def __str__(self) -> str:
        return f"{self.url} rank {self.dp_rank}"

    @classmethod
    def of(cls, rank: Rank) -> Self:
        return cls(rank.worker.id, rank.worker.url, rank.dp_rank)


class Ranks:
    """The ranks of every worker of a model with a KV-aware policy; a WorkerFollower.

    `max_pages` and `settings` as in KvIndexer.
    """

    def __init__(
        self, clock: Clock, *, max_pages: int, settings: SubscriberSettings | None = None
    ) -> None:
        self._clock = clock
        self._placements: dict[str, Placement] = {}
        self._of_worker: dict[Worker, tuple[Rank, ...]] = {}
        self._by_key: dict[Hashable, Rank] = {}
        self._next_order = 0
        self.picture = KvIndexer(
            clock,
            max_pages=max_pages,
            settings=settings,
            on_clear=self._on_clear,
            on_trust=self._on_trust,
        )

    def serve(self, model: str, placement: Placement) -> None:
        """Make ranks of the workers of this model that join from now on."""
        self._placements[model] = placement

    def __iter__(self) -> Iterator[tuple[RankKey, Rank]]:
        for ranks in self._of_worker.values():
            for rank in ranks:
                yield RankKey.of(rank), rank

    def of(self, worker: Worker) -> tuple[Rank, ...]:
        """The worker's ranks; empty if no KV-aware policy has use for it."""
        return self._of_worker.get(worker, ())

    def joined(self, worker: Worker) -> None:
        placement = self._placement(worker)
        if placement is None:
            return
        events = worker.spec.kv_events
        ranks = []
        for dp_rank in range(events.dp_size if events is not None else 1):
            load = RankLoad(placement.model_speed)
            rank = Rank(worker, dp_rank, order=self._next_order, load=load)
            self._next_order += 1
            ranks.append(rank)
            if events is not None:
                self._follow(rank, events)
        self._of_worker[worker] = tuple(ranks)

    def _follow(self, rank: Rank, events: KvEvents) -> None:
        worker, dp_rank = rank.worker, rank.dp_rank
        key = RankKey.of(rank)
        replay, load_port = events.replay_port, events.load_port
        endpoint = EventEndpoint(
            host=events.host,
            port=events.port + dp_rank,
            topic=events.topic,
            replay_port=None if replay is None else replay + dp_rank,
            load_port=None if load_port is None else load_port + dp_rank,
            load_topic=events.load_topic,
        )
        source = RankSource(endpoint=endpoint, page_size=events.block_size, bigram=events.bigram)
        load, clock = rank.load, self._clock

        def on_load(stat: LoadStat) -> None:
            load.report(stat, clock.monotonic())

        self._by_key[key] = rank
        try:
            self.picture.follow(key, source, on_load)
        except (RuntimeError, ValueError) as error:
            # The worker can be routed to all the same, by its load.
            del self._by_key[key]
            _log.error("kv_events_not_followed", worker=worker.url, rank=dp_rank, reason=str(error))

    async def left(self, worker: Worker) -> None:
        ranks = self._of_worker.pop(worker, ())
        keys = [RankKey.of(rank) for rank in ranks]
        for key, rank in zip(keys, ranks, strict=True):
            rank.holder = None
            self._by_key.pop(key, None)
            self._forget(rank)
        await asyncio.gather(*(self.picture.unfollow(key) for key in keys))

    def _placement(self, worker: Worker) -> Placement | None:
        """Of the first of its models that has one; a worker's models share its ranks."""
        for model in worker.model_ids:
            if placement := self._placements.get(model):
                return placement
        return None

    def _forget(self, rank: Rank) -> None:
        for model in rank.worker.model_ids:
            if placement := self._placements.get(model):
                placement.forget(rank)

    def _on_clear(self, key: Hashable) -> None:
        if rank := self._by_key.get(key):
            self._forget(rank)

    def _on_trust(self, key: Hashable, trusted: bool) -> None:
        if rank := self._by_key.get(key):
            rank.holder = self.picture.trusted_holder(key) if trusted else None
