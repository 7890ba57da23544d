"""The ranks of registered workers: what each holds, what it has to do, whether to believe it.

Workers come and go with discovery; from here on their ranks are what KV-aware policies choose. A
rank is followed only while its worker is registered: its sockets are closed before what it
held is dropped, so that nothing that arrives late can be taken for something it holds.
"""

import asyncio
from collections.abc import Iterator

import structlog

from extproc.clock import Clock
from extproc.kv.events import LoadStat
from extproc.kv.indexer import KvIndexer, RankSource, RankState
from extproc.kv.subscriptions.subscription import EventEndpoint, SubscriberSettings
from extproc.routing.placement import Placement
from extproc.routing.rank import Rank
from extproc.workers.observer import WorkerObserver
from extproc.workers.rank_load import RankLoad
from extproc.workers.worker import KvEvents, Worker

__all__ = ["Ranks"]

_log = structlog.get_logger()


class Ranks(WorkerObserver):
    """The ranks of every worker of a model with a KV-aware policy.

    `max_pages` and `settings` as in KvIndexer.
    """

    def __init__(self, clock: Clock, *, max_pages: int, settings: SubscriberSettings) -> None:
        self._clock = clock
        self._placements: dict[str, Placement] = {}
        self._of_worker: dict[Worker, tuple[Rank, ...]] = {}
        self._next_order = 0
        self.indexer = KvIndexer(clock, max_pages=max_pages, settings=settings)

    def serve(self, model: str, placement: Placement) -> None:
        """Make ranks of the workers of this model that join from now on."""
        self._placements[model] = placement

    def __iter__(self) -> Iterator[Rank]:
        for ranks in self._of_worker.values():
            yield from ranks

    def state(self, rank: Rank) -> RankState | None:
        """What is known of the rank's KV cache, or None if its KV events are not followed."""
        return None if rank.pages is None else self.indexer.state(rank.pages)

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
        worker, dp_rank = rank.worker.url, rank.dp_rank
        replay, load_port = events.replay_port, events.load_port
        endpoint = EventEndpoint(
            host=events.host,
            port=events.port + dp_rank,
            topic=events.topic,
            replay_port=None if replay is None else replay + dp_rank,
            load_port=None if load_port is None else load_port + dp_rank,
            load_topic=events.load_topic,
        )
        source = RankSource(
            worker=worker,
            dp_rank=dp_rank,
            endpoint=endpoint,
            page_size=events.block_size,
            bigram=events.bigram,
        )
        load, clock = rank.load, self._clock

        def report_load(stat: LoadStat) -> None:
            load.report(stat, clock.monotonic())

        try:
            rank.pages = self.indexer.follow(source, report_load)
        except (RuntimeError, ValueError) as error:
            # The worker can be routed to all the same, by its load.
            _log.error(
                "kv_events_not_followed", worker=rank.worker.url, rank=dp_rank, error=str(error)
            )

    async def left(self, worker: Worker) -> None:
        followed = []
        for rank in self._of_worker.pop(worker, ()):
            if rank.pages is not None:
                followed.append(rank.pages)
                rank.pages = None
        await asyncio.gather(*(self.indexer.unfollow(pages) for pages in followed))

    def _placement(self, worker: Worker) -> Placement | None:
        """Of the first of its models that has one; a worker's models share its ranks."""
        for model in worker.model_ids:
            if placement := self._placements.get(model):
                return placement
        return None
