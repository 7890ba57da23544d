"""A vLLM server that is killed under traffic, and comes back."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

import aiohttp
import pytest

from extproc.testing.stack import wait_until
from tests.engines.live.asking import CHAT, House, check, open_house, talk
from tests.engines.live.servers import Servers, start_together
from tests.engines.live.talks import Talk
from tests.engines.live.vllm import BLOCK, PORTS, model_folder, vllm_server

pytestmark = pytest.mark.timeout(900)
_CLIENTS = 8


class Traffic:
    """Clients that talk until they are stopped; counts answers by status."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.answers = 0
        self.failures: list[str] = []
        self.stopped = False

    async def client(self, number: int) -> None:
        talk = Talk(f"{uuid4().hex[:8]} {number}")
        while not self.stopped:
            body = {"model": "m", "max_tokens": 4, "messages": talk.question()}
            url = f"{self.house.stack.url}{CHAT}"
            try:
                async with self.house.http.post(url, json=body) as answer:
                    said = await answer.text()
                    if answer.status != 200:
                        self.failures.append(f"{answer.status} {said}")
            except aiohttp.ClientError as error:
                self.failures.append(str(error))
            self.answers += 1
            if len(talk.messages) > 16:
                talk = Talk(f"{uuid4().hex[:8]} {number}")

    async def more(self, count: int) -> None:
        """Wait for so many answers more."""
        wanted = self.answers + count

        async def enough() -> bool:
            return self.answers >= wanted

        await wait_until(enough, f"{count} more answers")


@asynccontextmanager
async def traffic(house: House) -> AsyncIterator[Traffic]:
    running = Traffic(house)
    async with asyncio.TaskGroup() as group:
        for number in range(_CLIENTS):
            group.create_task(running.client(number))
        yield running
        running.stopped = True


async def test_a_server_that_is_killed_and_comes_back(
    own_servers: Servers, vllm_engine: Path, tmp_path: Path
) -> None:
    model = model_folder(tmp_path, "tools")
    mortal, other = [
        own_servers.add(PORTS, lambda ports, log: vllm_server(vllm_engine, model, ports, log))
        for _ in range(2)
    ]
    start_together([mortal, other])
    async with open_house(tmp_path, [mortal.url, other.url], model, BLOCK) as house:
        check(await talk(house, count=2, turns=3), at_least_cached=4)
        async with traffic(house) as running:
            await running.more(60)
            mortal.kill()
            await running.more(100)
        # What the dead server was computing is lost; all other requests go to the other one.
        assert len(running.failures) <= _CLIENTS, running.failures
        mortal.start()
        await wait_until(
            lambda: house.stack.answers(f"{mortal.url}/health"), "the server is back", 300
        )
        await house.trusted()
        asked = await talk(house, count=4, turns=4)
        check(asked, at_least_cached=12)
        assert {one.worker for one in asked} == {mortal.url, other.url}
