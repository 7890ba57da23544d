"""What is believed of SGLang is what it caches."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.engines.bodies import all_bodies
from tests.engines.live.asking import Asked, check, open_house, talk
from tests.engines.live.servers import Pair, Servers, start_together, wait_ready
from tests.engines.live.sglang import PORTS, sglang_server
from tests.engines.live.talks import TOOLS, Talk, words
from tests.engines.vectors import MODELS

pytestmark = pytest.mark.timeout(900)
# By the name of the pair.
PAGES = {"pages-of-16": 16, "pages-of-1": 1}
_SHARED_TOKENS = 40
_SEVERAL = {"completions/two-texts", "completions/two-lists-of-ids", "completions/truncate-two"}
_WAYS: dict[str, Callable[[str], dict[str, Any]]] = {
    "/v1/chat/completions": lambda text: {"messages": [{"role": "user", "content": text}]},
    "/v1/completions": lambda text: {"prompt": text},
    "/v1/messages": lambda text: {"messages": [{"role": "user", "content": text}]},
}


@pytest.fixture
def page(request: pytest.FixtureRequest) -> int:
    return PAGES[request.node.callspec.params["pair"]]


@pytest.mark.parametrize("pair", PAGES, indirect=True)
async def test_conversations(pair: Pair, page: int, tmp_path: Path) -> None:
    async with open_house(tmp_path, pair.urls, pair.model, page) as house:
        check(await talk(house, count=4, turns=5), at_least_cached=12)
        check(await talk(house, count=2, turns=4, tools=TOOLS), at_least_cached=6)
        shown = [(one["engine"], one["engine_version"]) for one in await house.stack.workers()]
        assert shown == [("sglang", "0.5.23")] * 2


@pytest.mark.parametrize("pair", ["pages-of-16"], indirect=True)
@pytest.mark.parametrize("path", _WAYS)
async def test_every_endpoint(pair: Pair, page: int, tmp_path: Path, path: str) -> None:
    async with open_house(tmp_path, pair.urls, pair.model, page) as house:
        text = f"{uuid4().hex} {words(path, 120)}"
        asked = [await house.ask(_WAYS[path](text + " and" * n), path) for n in range(4)]
        check(asked, at_least_cached=3)


@pytest.mark.parametrize("pair", ["pages-of-16"], indirect=True)
async def test_every_body_of_the_vectors(pair: Pair, page: int, tmp_path: Path) -> None:
    async with open_house(tmp_path, pair.urls, pair.model, page) as house:
        tried = {body.name: await house.try_body(body) for body in all_bodies()}
    served = {name: asked for name, asked in tried.items() if asked is not None}
    wrong = {name: one for name, one in served.items() if one.total and not one.right}
    without = {name for name, one in served.items() if not one.total} - _SEVERAL
    assert not wrong, wrong
    assert len(served) > 300
    assert len(without) <= 0.02 * len(tried), without


@pytest.mark.parametrize("pair", PAGES, indirect=True)
async def test_salts_keep_tenants_apart(pair: Pair, page: int, tmp_path: Path) -> None:
    async with open_house(tmp_path, pair.urls, pair.model, page) as house:
        messages = Talk(uuid4().hex, system_words=150).question()
        asked = []
        for salt in ("a", "a", "b", None, None, "b", "a"):
            members = {} if salt is None else {"cache_salt": salt}
            asked.append(await house.chat(messages, **members))
        check(asked, at_least_cached=4)
        # With pages of one token, all prompts of a tenant share the beginning of the template.
        found = [one.cached > _SHARED_TOKENS for one in asked]
        assert found == [False, True, False, False, True, True, True]


@pytest.mark.parametrize("pair", PAGES, indirect=True)
async def test_what_is_evicted(pair: Pair, page: int, tmp_path: Path) -> None:
    async with open_house(tmp_path, pair.urls[:1], pair.model, page) as house:
        seed = uuid4().hex[:8]
        talks = [Talk(f"{seed} {number}", system_words=600) for number in range(26)]
        asked = [await house.chat(one.question()) for one in talks]
        asked += [await house.chat(one.question()) for one in reversed(talks)]
        check(asked, at_least_cached=4)


@pytest.mark.parametrize("pair", ["pages-of-16"], indirect=True)
async def test_sixteen_at_once(pair: Pair, page: int, tmp_path: Path) -> None:
    async with open_house(tmp_path, pair.urls, pair.model, page, debug_log=True) as house:
        seed = uuid4().hex[:8]
        asked: list[Asked] = []

        async def client(number: int) -> None:
            one = Talk(f"{seed} {number}")
            for _ in range(6):
                asked.append(await house.chat(one.question(), settle=False))
                one.answered(asked[-1].text)

        async with asyncio.TaskGroup() as group:
            for number in range(16):
                group.create_task(client(number))
        predicted = house.predicted_tokens()
        over = [one for one in asked if one.believed > one.cached]
        exact = [
            one
            for one in asked
            if max(one.believed, predicted.get(one.request_id, 0)) == one.cached
        ]
        assert not over, over[:5]
        assert all(one.total == one.prompt for one in asked)
        assert len(exact) >= 0.95 * len(asked), (len(exact), len(asked))


async def test_a_server_that_was_killed_is_known_anew(
    own_servers: Servers, sglang_engine: Path, tmp_path: Path
) -> None:
    model, page = MODELS / "tools", 16
    servers = [
        own_servers.add(
            PORTS,
            lambda ports, log: sglang_server(
                sglang_engine, model, ports, log, "--page-size", str(page)
            ),
        )
        for _ in range(2)
    ]
    await asyncio.to_thread(start_together, servers)
    urls = [one.url for one in servers]
    async with open_house(tmp_path, urls, model, page) as house:
        check(await talk(house, count=2, turns=3), at_least_cached=4)
        servers[0].kill()
        servers[0].start()
        await asyncio.to_thread(wait_ready, servers[:1])
        await house.trusted()
        check(await talk(house, count=4, turns=4), at_least_cached=12)
