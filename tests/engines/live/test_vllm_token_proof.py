"""vLLM says at run time whether its tokens are those of the service."""

from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import pytest

from extproc.testing.stack import wait_until
from tests.engines.live.asking import House, open_house
from tests.engines.live.servers import Pair
from tests.engines.live.talks import TOOLS, Talk
from tests.engines.live.vllm import BLOCK

pytestmark = pytest.mark.timeout(900)
_MODELS: Final = Path(__file__).parents[1] / "models"


async def proofs(house: House, state: str) -> list[dict[str, Any]]:
    """What is known of the tokens of all workers, once each is in this state."""
    found: list[dict[str, Any]] = []

    async def check() -> bool:
        found[:] = [one["tokens"].get("m", {}) for one in await house.stack.workers()]
        return len(found) == len(house.urls) and all(one.get("state") == state for one in found)

    await wait_until(check, f"the tokens of all workers are {state}", 30)
    return found


@pytest.mark.parametrize("pair", ["qwen", "llama", "gemma"], indirect=True)
async def test_the_same_tokens_are_proven(pair: Pair, tmp_path: Path) -> None:
    async with open_house(tmp_path, pair.urls, pair.model, BLOCK) as house:
        for proof in await proofs(house, "proven"):
            assert proof["differences"] == []
            assert {"text", "conversation", "tools", "parts", "continued"} <= {*proof["equal"]}


@pytest.mark.parametrize("pair", ["llama"], indirect=True)
async def test_all_apis_are_proven_by_an_engine_that_renders_them(
    pair: Pair, tmp_path: Path
) -> None:
    async with open_house(tmp_path, pair.urls, pair.model, BLOCK) as house:
        for proof in await proofs(house, "proven"):
            assert proof["not_compared"] == []
            assert {"responses", "messages"} <= {*proof["equal"]}


@pytest.mark.parametrize("pair", ["qwen", "llama"], indirect=True)
async def test_a_service_without_a_tokenizer_has_its_tokens_from_the_engine(
    pair: Pair, tmp_path: Path
) -> None:
    model = {"id": "m", "policy": "cache_aware_zmq", "tokens_from": "engine"}
    async with open_house(tmp_path, pair.urls, pair.model, BLOCK, models=[model]) as house:
        await asked_twice(house, uuid4().hex)


async def asked_twice(house: House, seed: str) -> None:
    """A conversation; the answer to a first question can be late, and counts for the second."""
    talk, asked = Talk(seed), []
    for _ in range(4):
        await house.chat(talk.question(), tools=TOOLS)
        asked.append(await house.chat(talk.question(), tools=TOOLS))
        talk.answered(asked[-1].text)
    assert [one for one in asked if not one.right] == []
    assert sum(one.cached > 0 for one in asked) >= 3


@pytest.mark.parametrize("pair", ["qwen"], indirect=True)
async def test_a_service_with_another_model_names_it_and_asks_the_engine(
    pair: Pair, tmp_path: Path
) -> None:
    other = {
        "id": "m",
        "policy": "cache_aware_zmq",
        "tokenizer_path": str(_MODELS / "bos"),
        "tokens_from": "engine",
    }
    async with open_house(tmp_path, pair.urls, pair.model, BLOCK, models=[other]) as house:
        for proof in await proofs(house, "differs"):
            assert proof["reason"] in ("other_tokenizer", "first_token")
            assert {"text", "chat", "tools"} <= {*proof["by_load"]}
        await asked_twice(house, uuid4().hex)
