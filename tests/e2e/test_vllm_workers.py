"""Workers like vLLM behind the real Envoy: what the service believes is what they reuse.

They are found without configuration, and render chats with code of their own, which the engine's
vectors hold. Each request goes through Envoy; the overlap that the service claims must be what the
worker then reports as cached.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from extproc.testing.stack import wait_until
from tests.e2e.conftest import Launch
from tests.e2e.test_kv_routing import LONG, PAGE, Pool
from tests.engines.vectors import MODELS

PATH = str(MODELS / "tools")
TOOLS = [
    {
        "type": "function",
        "defer_loading": False,
        "function": {
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
            "description": f"the weather of a city in the next {days} days",
            "strict": None,
            "name": f"weather_{days}",
        },
    }
    for days in range(20)
]
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather_1", "arguments": '{"city": "Paris"}'},
}

StartVllm = Callable[..., Awaitable[Pool]]


class Vllm(Pool):
    """Sends requests, and compares each claimed overlap with what was cached."""

    async def exact(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        """The cached tokens, which must be those that were claimed, and the worker's URL."""
        answer, shown = await self.post(path, body)
        usage = answer["usage"]
        if "input_tokens" in usage:
            total = usage["input_tokens"]
            details = usage.get("input_tokens_details") or {}
            cached = usage.get("cache_read_input_tokens", details.get("cached_tokens"))
        else:
            total, cached = usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]
        assert shown["overlap"] == f"{cached}/{total}", shown
        await self.settled()
        return cached, shown["worker"]


@pytest.fixture
def vllm(launch: Launch) -> StartVllm:
    async def start(workers: int = 2, policy: str = "cache_aware_zmq", **worker: Any) -> Pool:
        settings = {
            "engine": "vllm",
            "page_size": PAGE,
            "kv_events_port": 0,
            "tokenizer_path": PATH,
            "decode_milliseconds_per_token": 0,
        }
        running = await launch(
            workers,
            worker=settings | worker,
            settings={
                "models": [{"id": "m", "policy": policy, "tokenizer_path": PATH}],
                "observability": {"debug_headers": True},
            },
        )
        started = Vllm(running)
        await started.settled()
        return started

    return start


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


async def turns(fleet: Any, bodies: list[dict[str, Any]], path: str) -> list[int]:
    """The cached tokens of these requests, all of which one worker must have served."""
    served = [await fleet.exact(path, body) for body in bodies]
    assert len({url for _, url in served}) == 1
    return [cached for cached, _ in served]


CHAT = "/v1/chat/completions"


async def test_a_conversation_is_believed_exactly(vllm: StartVllm) -> None:
    fleet = await vllm()
    history = [said("system", LONG), said("user", LONG)]
    cached = []
    for turn in range(4):
        answer, shown = await fleet.post(CHAT, {"messages": history, "max_tokens": 40})
        usage = answer["usage"]
        cached.append(usage["prompt_tokens_details"]["cached_tokens"])
        assert shown["overlap"] == f"{cached[-1]}/{usage['prompt_tokens']}"
        reply = answer["choices"][0]["message"]["content"]
        history += [said("assistant", reply), said("user", f"And then, {turn}?")]
        await fleet.settled()
    assert cached == sorted(cached)
    # Outputs are among what is found again.
    assert cached[1] > 0
    assert cached[3] - cached[1] > 64


async def test_a_prompt_that_is_held_in_full_is_believed_without_its_last_block(
    vllm: StartVllm,
) -> None:
    fleet = await vllm()
    ids = [*range(5, 5 + 4 * PAGE)]
    bodies = [{"prompt": ids, "max_tokens": 2}] * 3
    assert await turns(fleet, bodies, "/v1/completions") == [0, 3 * PAGE, 3 * PAGE]


async def test_tools_are_believed_exactly(vllm: StartVllm) -> None:
    fleet = await vllm()
    question = [said("user", "Will it rain?")]
    history = [*question, said("assistant", None, tool_calls=[CALL]), said("tool", "sunny")]
    tool = {"type": "function", "function": {"name": "weather_1"}}
    bodies: list[dict[str, Any]] = [
        {"messages": question, "tools": TOOLS},
        {"messages": question, "tools": TOOLS, "tool_choice": "none"},
        {"messages": question, "tools": TOOLS, "tool_choice": tool},
        {"messages": history, "tools": TOOLS, "tool_choice": "required"},
        {"messages": [*history, said("user", [{"type": "text", "text": LONG}])], "tools": TOOLS},
    ]
    first, *others = await turns(fleet, [body | {"max_tokens": 2} for body in bodies], CHAT)
    assert first == 0
    assert min(others) > 500


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", {"messages": [said("user", LONG)], "system": LONG, "max_tokens": 2}),
        ("/v1/responses", {"input": LONG, "instructions": LONG, "max_output_tokens": 2}),
        ("/v1/completions", {"prompt": LONG, "max_tokens": 2}),
    ],
)
async def test_every_api_is_believed_exactly(
    vllm: StartVllm, path: str, body: dict[str, Any]
) -> None:
    fleet = await vllm()
    first, second = await turns(fleet, [body, body], path)
    assert first == 0
    assert second > 64


async def test_salts_have_prefixes_of_their_own(vllm: StartVllm) -> None:
    fleet: Any = await vllm()
    body = {"messages": [said("user", LONG)], "max_tokens": 2}
    for salt in ({}, {"cache_salt": "a"}, {"cache_salt": "b"}):
        assert (await fleet.exact(CHAT, body | salt))[0] == 0
    for salt in ({}, {"cache_salt": "a"}, {"cache_salt": "b"}):
        assert (await fleet.exact(CHAT, body | salt))[0] > 64


async def test_a_sliding_window_is_believed_exactly(vllm: StartVllm) -> None:
    """The group with the window has number 0, as in Gemma; it keeps only its last blocks."""
    fleet: Any = await vllm(1, sliding_window=4 * PAGE, max_total_num_tokens=96 * PAGE)
    cached = []
    for number in range(3):
        for length in (600, 300, 600):
            body = {"prompt": [number, *range(5, length)], "max_tokens": 4}
            cached.append((await fleet.exact("/v1/completions", body))[0])
    assert max(cached) > 500
    assert 0 in cached


async def test_an_eviction_is_followed(vllm: StartVllm) -> None:
    fleet: Any = await vllm(1, max_total_num_tokens=40 * PAGE)
    found = []
    for number in (1, 2, 3, 1, 3, 2):
        body = {"prompt": [number, *range(5, 5 + 15 * PAGE)], "max_tokens": 20}
        found.append((await fleet.exact("/v1/completions", body))[0])
    assert found[:3] == [0, 0, 0]
    assert max(found) > 0


async def test_an_adapter_is_served_where_it_is_loaded(vllm: StartVllm) -> None:
    fleet: Any = await vllm(2)
    url = fleet.urls[1]
    body = {"lora_name": "sql", "lora_path": "/adapters/sql"}
    async with fleet.running.http.post(f"{url}/v1/load_lora_adapter", json=body) as answer:
        assert answer.status == 200

    async def known() -> bool:
        async with fleet.running.http.get(f"{fleet.running.url}/v1/models") as answer:
            return "sql" in [card["id"] for card in (await answer.json())["data"]]

    await wait_until(known, "the adapter is known")
    chat = {"messages": [said("user", LONG)], "max_tokens": 2}
    for _ in range(3):
        assert (await fleet.exact(CHAT, chat | {"model": "sql"}))[1] == url
    # The base model's blocks are others, though its tokens are the same.
    answer, _ = await fleet.post(CHAT, chat, url)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


async def test_a_worker_that_restarts_is_believed_again(vllm: StartVllm) -> None:
    fleet: Any = await vllm(1)
    body = {"messages": [said("user", LONG)], "max_tokens": 2}
    assert await turns(fleet, [body, body], CHAT) != [0, 0]
    await fleet.running.fleet.workers[0].restart()
    await fleet.settled()
    first, second = await turns(fleet, [body, body], CHAT)
    assert (first, second > 64) == (0, True)
