"""The configured list as a source: all workers at once, then what another list changes."""

import asyncio

import pytest

from extproc.config.schema import StaticUrlsConfig
from extproc.discovery.static_urls import StaticUrls
from extproc.workers.source import Added, Listed, Removed
from tests.builders import make_spec
from tests.fakes import settle


async def test_every_url_is_added_in_order_before_the_list_is_complete() -> None:
    events = StaticUrls(StaticUrlsConfig(urls=["http://b:1/", "https://a"])).events()
    seen = [await anext(events) for _ in range(3)]
    assert seen == [
        Added(make_spec("http://b:1")),
        Added(make_spec("https://a:443")),
        Listed(),
    ]
    first = seen[0]
    assert isinstance(first, Added)
    assert (first.spec.id, first.spec.role, first.spec.model_ids) == ("http://b:1", "plain", ())


async def test_the_source_stays_open_until_it_is_cancelled() -> None:
    events = StaticUrls(StaticUrlsConfig(urls=[])).events()
    assert await anext(events) == Listed()
    waiting = asyncio.ensure_future(anext(events))
    await settle()
    assert not waiting.done()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_another_list_adds_and_removes_what_differs() -> None:
    source = StaticUrls(StaticUrlsConfig(urls=["http://a:1", "http://b:1", "http://c:1"]))
    events = source.events()
    for _ in range(4):
        await anext(events)
    source.replace(StaticUrlsConfig(urls=["http://d:1", "http://b:1/", "http://c:1"]))
    source.replace(
        StaticUrlsConfig(
            urls=["http://d:1", "http://c:1", "http://a:1"], decode_urls=["http://c:1"]
        )
    )
    seen = [await anext(events) for _ in range(6)]
    assert seen[:3] == [
        Removed("http://a:1"),
        Added(make_spec("http://d:1")),
        Removed("http://b:1"),
    ]
    # What a worker was configured as belongs to it.
    assert seen[3] == Removed("http://c:1")
    assert isinstance(seen[4], Added)
    assert (seen[4].spec.id, seen[4].spec.role) == ("http://c:1", "decode")
    assert seen[5] == Added(make_spec("http://a:1"))
