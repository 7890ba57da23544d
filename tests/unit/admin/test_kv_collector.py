"""The metrics of KV pages and tokenization show the state at the time of the scrape."""

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from extproc.admin.kv_collector import EncoderCollector, KvCollector
from extproc.clock import SystemClock
from extproc.engines.engine import DEFAULT_ENGINE
from extproc.kv.subscriptions.subscription import SubscriberSettings
from extproc.routing.ranks import Ranks
from extproc.tokenization.encoder import EncoderSettings, PromptEncoder
from extproc.tokenization.prompts import read_prompt
from extproc.workers.prefill_speed import PrefillSpeed
from extproc.workers.worker import KvEvents
from tests.builders import make_worker
from tests.fakes import FakeClock
from tests.unit.simulator.model_folders import model_folder

SGLANG = DEFAULT_ENGINE.rules

URL = "http://10.0.0.1:8000"


@pytest.fixture
async def ranks() -> AsyncIterator[Ranks]:
    """The two ranks of one worker, whose ports are closed."""
    followed = Ranks(FakeClock(), max_pages=10_000, settings=SubscriberSettings(), recheck=print)
    followed.serve({"m": PrefillSpeed()})
    events = KvEvents(host="127.0.0.1", port=1, block_size=4, dp_size=2)
    followed.joined(make_worker(URL, kv_events=events))
    yield followed
    await followed.indexer.close()


async def test_ranks_are_shown_while_they_are_followed(ranks: Ranks) -> None:
    registry = CollectorRegistry()
    registry.register(KvCollector(ranks, FakeClock()))
    rank, _ = ranks
    assert rank.pages is not None
    tokens = np.arange(8, dtype=np.uint64)
    ranks.indexer.index.store(rank.pages, [1, 2], None, tokens, 4)
    ranks.indexer.index.store(rank.pages, [3], 7, tokens[:4], 4)  # the parent is unknown
    rank.load.book(500, 0.0)

    def sample(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, labels)

    labels = {"worker": URL, "rank": "0"}
    assert sample("extproc_kv_rank_pages", **labels, tier="device") == 2
    assert sample("extproc_kv_rank_trusted", **labels) == 0
    assert sample("extproc_kv_last_event_age_seconds", **labels) is None
    assert sample("extproc_rank_requests", **labels) == 1
    assert sample("extproc_rank_requests", worker=URL, rank="1") == 0
    assert sample("extproc_kv_pages") == 2
    assert sample("extproc_kv_index_bytes") == 500
    assert sample("extproc_kv_ranks") == sample("extproc_kv_ranks_untrusted") == 2
    assert sample("extproc_kv_ranks_connected") == 0
    assert sample("extproc_kv_pages_kept_out_total", reason="unknown_parent") == 1
    await ranks.left(rank.worker)
    assert URL.encode() not in generate_latest(registry)
    assert sample("extproc_kv_ranks") == 0


async def test_tokenization_is_counted_by_model(tmp_path: Path) -> None:
    encoder = PromptEncoder.load(Path(model_folder(tmp_path)), EncoderSettings(), SystemClock())
    registry = CollectorRegistry()
    registry.register(EncoderCollector({"m": encoder}))
    body = b'{"model": "m", "messages": [{"role": "user", "content": "hello hello hello"}]}'
    for _ in range(2):
        encoded = await encoder.encode(read_prompt(SGLANG, "/v1/chat/completions", body))
        assert encoded.ids is not None

    def sample(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {"model": "m", **labels})

    assert sample("extproc_tokenizations_total", place="loop") == 2
    assert sample("extproc_tokenizations_total", place="thread") == 0
    hits = sample("extproc_token_segments_total", outcome="hit")
    misses = sample("extproc_token_segments_total", outcome="miss")
    assert hits == misses
    assert hits
    assert (sample("extproc_token_cache_bytes") or 0) > 0
    assert sample("extproc_token_cache_enabled") == 1
    encoder.close()
