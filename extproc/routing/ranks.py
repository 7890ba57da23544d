"""Keeps the ranks of registered workers: their load books and, where followed, their KV pages.

Workers join and leave with discovery. A rank's KV events are followed only while its worker is
registered: its sockets are closed before its pages are dropped, so that no late event can store a
page. Separate from the worker registry, which knows neither ranks nor KV events.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import structlog

from extproc.clock import Clock
from extproc.engines.engine import DEFAULT_ENGINE, Engine
from extproc.kv.events import LoadStat
from extproc.kv.indexer import KvIndexer, RankSource, RankState
from extproc.kv.subscriptions.subscription import EventEndpoint, SubscriberSettings
from extproc.routing.rank import Rank
from extproc.workers.observer import WorkerObserver
from extproc.workers.prefill_speed import PrefillSpeed
from extproc.workers.rank_load import RankLoad
from extproc.workers.worker import KvEvents, Worker

__all__ = ["Ranks"]

_log = structlog.get_logger()


class Ranks(WorkerObserver):
    """The ranks of all workers of models with a KV-aware policy.

    `max_pages` and `settings` are those of KvIndexer. `recheck` is called with a worker whose
    engine may have been replaced by another process.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        max_pages: int,
        settings: SubscriberSettings,
        recheck: Callable[[Worker], None],
    ) -> None:
        self._clock = clock
        self._recheck = recheck
        self._speeds: dict[str, PrefillSpeed] = {}
        self._of_worker: dict[Worker, tuple[Rank, ...]] = {}
        self._engines: dict[str, Counter[Engine]] = {}
        self._next_order = 0
        self.indexer = KvIndexer(clock, max_pages=max_pages, settings=settings)

    def serve(self, speeds: Mapping[str, PrefillSpeed]) -> None:
        """Keep ranks of the workers of these models that join from now on, and of no others."""
        self._speeds = dict(speeds)

    def __iter__(self) -> Iterator[Rank]:
        for ranks in self._of_worker.values():
            yield from ranks

    def state(self, rank: Rank) -> RankState | None:
        """What is known of the rank's KV cache, or None if its KV events are not followed."""
        return None if rank.pages is None else self.indexer.state(rank.pages)

    def of(self, worker: Worker) -> tuple[Rank, ...]:
        """The worker's ranks; empty if its models have no KV-aware policy."""
        return self._of_worker.get(worker, ())

    def engines_of(self, model: str) -> Sequence[Engine]:
        """The engines of the model's workers; the default one while there are no workers."""
        found = self._engines.get(model)
        return tuple(found) if found else (DEFAULT_ENGINE,)

    def joined(self, worker: Worker) -> None:
        speed = self._speed(worker)
        if speed is None:
            return
        events = worker.spec.kv_events
        ranks = []
        for dp_rank in range(events.dp_size if events is not None else 1):
            rank = Rank(worker, dp_rank, order=self._next_order, load=RankLoad(speed))
            self._next_order += 1
            ranks.append(rank)
            if events is not None:
                self._follow(rank, events)
        self._of_worker[worker] = tuple(ranks)
        for model in worker.model_ids:
            self._engines.setdefault(model, Counter())[ranks[0].engine] += 1

    def _follow(self, rank: Rank, events: KvEvents) -> None:
        load, clock = rank.load, self._clock

        def report_load(stat: LoadStat) -> None:
            load.report(stat, clock.monotonic())

        def report_break() -> None:
            self._recheck(rank.worker)

        try:
            source = _source(rank, events)
            rank.pages = self.indexer.follow(source, report_load, report_break)
        except (RuntimeError, ValueError) as error:
            # Requests can still be routed to the rank, by its load.
            _log.error(
                "kv_events_not_followed",
                worker=rank.worker.url,
                rank=rank.dp_rank,
                error=str(error),
            )

    async def left(self, worker: Worker) -> None:
        followed = []
        ranks = self._of_worker.pop(worker, ())
        if ranks:
            self._forget_engine(worker, ranks[0].engine)
        for rank in ranks:
            if rank.pages is not None:
                followed.append(rank.pages)
                rank.pages = None
        await asyncio.gather(*(self.indexer.unfollow(pages) for pages in followed))

    def _forget_engine(self, worker: Worker, engine: Engine) -> None:
        for model in worker.model_ids:
            engines = self._engines.get(model)
            if engines is None:
                continue
            engines[engine] -= 1
            if not engines[engine]:
                del engines[engine]
            if not engines:
                del self._engines[model]

    def _speed(self, worker: Worker) -> PrefillSpeed | None:
        """The speed of the first of its models that has one; these models share its ranks."""
        for model in worker.model_ids:
            if speed := self._speeds.get(model):
                return speed
        return None


def _source(rank: Rank, events: KvEvents) -> RankSource:
    """Where the rank publishes; raises ValueError if that is unknown or not a TCP port."""
    hosts = dict(rank.worker.spec.rank_hosts)
    host = hosts.get(rank.dp_rank) if hosts else events.host
    if host is None:
        raise ValueError("no pod says that it runs this rank; see discovery.k8s_pods.ranks_from")
    dp_rank, replay, load_port = rank.dp_rank, events.replay_port, events.load_port
    endpoint = EventEndpoint(
        host=host,
        port=events.port + dp_rank,
        topic=events.topic,
        replay_port=None if replay is None else replay + dp_rank,
        load_port=None if load_port is None else load_port + dp_rank,
        load_topic=events.load_topic,
    )
    return RankSource(
        worker=rank.worker.url,
        dp_rank=dp_rank,
        endpoint=endpoint,
        page_size=events.block_size,
        bigram=events.bigram,
    )
