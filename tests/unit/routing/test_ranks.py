"""Tests that ranks join and leave with their workers; no engine listens at their ports."""

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from extproc.kv.indexer import KvIndexer, RankSource
from extproc.kv.rank_pages import RankPages
from extproc.kv.subscriptions.subscription import EventEndpoint, SubscriberSettings
from extproc.routing.ranks import Ranks
from extproc.workers.prefill_speed import PrefillSpeed
from extproc.workers.worker import KvEvents
from tests.builders import make_worker
from tests.fakes import FakeClock

URL = "http://10.0.0.1:8000"


class NotingIndexer(KvIndexer):
    """Notes the endpoints of the ranks that it follows."""

    followed: list[EventEndpoint]

    def follow(self, source: RankSource, *reports: Any) -> RankPages:
        self.followed = [*getattr(self, "followed", ()), source.endpoint]
        return super().follow(source, *reports)


def events(port: int = 5557, dp_size: int = 2) -> KvEvents:
    return KvEvents(host="127.0.0.1", port=port, block_size=16, dp_size=dp_size)


@pytest.fixture
async def ranks() -> AsyncIterator[Ranks]:
    made = Ranks(FakeClock(), max_pages=1000, settings=SubscriberSettings(), recheck=print)
    made.serve({"m": PrefillSpeed()})
    yield made
    await made.indexer.close()


async def test_a_worker_has_as_many_ranks_as_it_announces(ranks: Ranks) -> None:
    worker = make_worker(URL, kv_events=events(dp_size=3))
    ranks.joined(worker)
    found = ranks.of(worker)
    assert [rank.dp_rank for rank in found] == [0, 1, 2]
    assert list(ranks) == list(found)
    for rank in found:
        assert rank.pages is not None
        assert (rank.pages.worker, rank.pages.dp_rank) == (URL, rank.dp_rank)
        assert not rank.pages.trusted
        assert ranks.state(rank) is not None


async def test_a_worker_without_kv_events_has_one_rank_without_pages(ranks: Ranks) -> None:
    worker = make_worker(URL)
    ranks.joined(worker)
    (rank,) = ranks.of(worker)
    assert rank.pages is None
    assert ranks.state(rank) is None


async def test_a_worker_of_another_model_has_no_ranks(ranks: Ranks) -> None:
    worker = make_worker(URL, model_ids=("other",), kv_events=events())
    ranks.joined(worker)
    assert ranks.of(worker) == ()
    await ranks.left(worker)


async def test_the_pages_of_a_worker_that_left_are_not_trusted(ranks: Ranks) -> None:
    worker = make_worker(URL, kv_events=events(dp_size=1))
    ranks.joined(worker)
    (rank,) = ranks.of(worker)
    pages = rank.pages
    assert pages is not None
    pages.trusted = True
    generation = pages.generation
    await ranks.left(worker)
    assert (pages.trusted, rank.pages) == (False, None)
    assert pages.generation > generation
    assert ranks.indexer.states() == {}


async def test_a_rank_whose_port_does_not_exist_is_routed_to_by_load(ranks: Ranks) -> None:
    worker = make_worker(URL, kv_events=events(port=65_535))
    with capture_logs() as logs:
        ranks.joined(worker)
    assert [rank.pages is not None for rank in ranks.of(worker)] == [True, False]
    assert logs == [
        {
            "event": "kv_events_not_followed",
            "log_level": "error",
            "worker": URL,
            "rank": 1,
            "error": "not a TCP port: 65536",
        }
    ]


async def test_ranks_are_followed_at_the_hosts_of_their_pods_and_others_not_at_all(
    ranks: Ranks,
) -> None:
    worker = make_worker(URL, kv_events=events(dp_size=3))
    hosts = ((0, "127.0.0.1"), (2, "127.0.0.2"))
    worker.spec = msgspec.structs.replace(worker.spec, rank_hosts=hosts)
    indexer = NotingIndexer(FakeClock(), max_pages=1000, settings=SubscriberSettings())
    await ranks.indexer.close()
    ranks.indexer = indexer
    with capture_logs() as logs:
        ranks.joined(worker)
    found = [(one.host, one.port) for one in indexer.followed]
    assert found == [("127.0.0.1", 5557), ("127.0.0.2", 5559)]
    assert [rank.pages is None for rank in ranks.of(worker)] == [False, True, False]
    assert [(one["event"], one["rank"]) for one in logs] == [("kv_events_not_followed", 1)]
    assert "ranks_from" in logs[0]["error"]
