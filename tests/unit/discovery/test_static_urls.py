"""The configured list as a source: all workers at once, then no further event."""

import asyncio

import pytest

from extproc.config.schema import StaticUrlsConfig
from extproc.discovery.static_urls import StaticUrls
from extproc.workers.source import Added, Listed
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
