"""LoRA adapters of real vLLM: found, routed, apart from the model, loaded and unloaded."""

from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from extproc.testing.stack import wait_until
from tests.engines.live.adapters import make_adapter
from tests.engines.live.asking import Asked, House, open_house
from tests.engines.live.servers import Pair
from tests.engines.live.talks import Talk
from tests.engines.live.vllm import BLOCK

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.parametrize("pair", ["adapters"], indirect=True),
]


async def change(house: House, url: str, action: str, name: str, path: Path | None = None) -> None:
    body: dict[str, Any] = {"lora_name": name}
    if path is not None:
        body["lora_path"] = str(path)
    async with house.http.post(f"{url}/v1/{action}_lora_adapter", json=body) as answer:
        assert answer.status == 200, await answer.text()


async def listed(house: House, name: str, *urls: str) -> None:
    """Wait until the service knows that just these workers have the adapter."""

    async def check() -> bool:
        workers = await house.stack.workers()
        return set(urls) == {one["url"] for one in workers if name in one["adapters"]}

    await wait_until(check, f"{name} is at {urls}")


async def test_adapters_are_loaded_routed_and_unloaded(pair: Pair, tmp_path: Path) -> None:
    one, two = pair.urls
    (tmp_path / "stack").mkdir()
    async with open_house(tmp_path / "stack", pair.urls, pair.model, BLOCK) as house:
        for name, urls in (("sql", [one]), ("chat", [one, two])):
            path = make_adapter(tmp_path, name)
            for url in urls:
                await change(house, url, "load", name, path)
            await listed(house, name, *urls)
        talk = Talk(uuid4().hex, system_words=150)
        asked: list[Asked] = []
        texts: dict[str, set[str]] = {"m": set(), "sql": set(), "chat": set()}
        for _ in range(3):
            messages = talk.question()
            for name in ("m", "sql", "m:sql", "chat", "m:chat", "m"):
                asked.append(await house.ask({"messages": messages, "model": name}))
                if name.endswith("sql"):
                    assert asked[-1].worker == one
                texts[name.removeprefix("m:")].add(asked[-1].text)
        wrong = [found for found in asked if not found.right]
        assert not wrong, f"{len(wrong)} of {len(asked)} differ: {wrong[:5]}"
        # The first request of each of the three is new to the engines, all others are not.
        assert sum(found.cached == 0 for found in asked) == 3, asked
        # The adapters have other answers than the model, so they were really used.
        assert texts["sql"].isdisjoint(texts["m"])
        await change(house, one, "unload", "sql")
        await listed(house, "sql")
        body = {"model": "sql", "messages": messages}
        async with house.http.post(f"{house.stack.url}/v1/chat/completions", json=body) as answer:
            assert answer.status == 404
            assert answer.headers["x-router-error-code"] == "model_not_found"
        for url in pair.urls:
            await change(house, url, "unload", "chat")
