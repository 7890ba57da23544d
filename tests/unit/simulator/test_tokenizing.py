"""A simulated SGLang answers with the tokens that it computes for a request."""

from pathlib import Path
from typing import Any

import aiohttp
import pytest

from extproc.simulator.http import start
from extproc.simulator.settings import SimulatorSettings
from tests.unit.simulator.model_folders import model_folder

MESSAGES = [{"role": "user", "content": "hi"}]


async def ask(path: str, body: Any, folder: str | None = None, **settings: Any) -> tuple[int, Any]:
    async with (
        await start(SimulatorSettings(port=0, tokenizer_path=folder, **settings)) as worker,
        aiohttp.ClientSession() as http,
        http.post(f"{worker.url}{path}", json=body) as answer,
    ):
        return answer.status, await answer.json()


@pytest.mark.parametrize("path", ["/v1/tokenize", "/tokenize"])
async def test_a_text_is_encoded(path: str) -> None:
    status, said = await ask(path, {"prompt": "hé"})
    assert (status, said["tokens"], said["count"]) == (200, [104, 195, 169], 3)


async def test_several_texts_are_encoded_one_by_one() -> None:
    _, said = await ask("/v1/tokenize", {"prompt": ["a", "bc"]})
    assert (said["tokens"], said["count"]) == ([[97], [98, 99]], [1, 2])


async def test_a_chat_is_rendered_and_encoded_as_in_a_request(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    _, said = await ask("/v1/tokenize", {"messages": MESSAGES}, folder)
    async with (
        await start(SimulatorSettings(port=0, tokenizer_path=folder)) as worker,
        aiohttp.ClientSession() as http,
        http.post(f"{worker.url}/v1/chat/completions", json={"messages": MESSAGES}) as answer,
    ):
        usage = (await answer.json())["usage"]
    assert said["count"] == usage["prompt_tokens"] == len(said["tokens"])


@pytest.mark.parametrize("body", [{}, {"prompt": 1}, {"messages": "x"}, {"prompt": [[1]]}])
async def test_other_bodies_are_refused(body: Any) -> None:
    status, _ = await ask("/v1/tokenize", body)
    assert status == 400


async def test_an_engine_without_the_path_answers_404() -> None:
    status, _ = await ask("/v1/tokenize", {"prompt": "x"}, no_server_info=True)
    assert status == 404
