"""Workers are asked for their tokens, and a fleet with another template is routed by load.

Real Envoy, real service; the workers render with templates of their own.
"""

from pathlib import Path
from typing import Any

import pytest

from extproc.testing.stack import wait_until
from tests.e2e.conftest import Launch, Running
from tests.unit.simulator.model_folders import CHATML, model_folder

PAGE = 16
LONG = "The tide comes in and the tide goes out. " * 20
# The engine shows tools as another list than this service expects.
OTHER_TOOLS = CHATML.replace("<|im_start|>tools", "<|im_start|>functions")
OTHER_TURNS = CHATML.replace("message.role + ", "message.role + ': ' + ")
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]


class Service:
    """A running service of one model whose policy looks at KV pages."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self.urls = [worker.url for worker in running.fleet.workers]

    async def tokens(self, url: str) -> dict[str, Any]:
        """What `/workers` says of the tokens of a worker."""
        shown = {worker["url"]: worker for worker in await self.running.stack.workers()}
        found: dict[str, Any] = shown[url]["tokens"].get("m", {})
        return found

    async def proven(self, *states: str | None) -> None:
        async def check() -> bool:
            found = [(await self.tokens(url)).get("state") for url in self.urls]
            return found == [*states]

        await wait_until(check, f"the workers are {states}")

    async def settled(self) -> None:
        async def check() -> bool:
            workers = {one["url"]: one for one in await self.running.stack.workers()}
            ranks = [rank for url in self.urls for rank in workers[url]["kv"]["ranks"]]
            stats = await self.running.fleet.stats()
            held = [cache["gpu_tokens"] // PAGE for one in stats for cache in one["caches"]]
            return [rank.get("pages") for rank in ranks] == held and all(
                rank["trusted"] for rank in ranks
            )

        await wait_until(check, "the service knows what the workers hold")

    async def chat(self, url: str | None = None, **fields: Any) -> dict[str, str]:
        """Send a long chat to Envoy or to one worker; gives the debug headers."""
        body = {
            "model": "m",
            "messages": [{"role": "user", "content": LONG}],
            "max_tokens": 2,
            **fields,
        }
        async with self.running.http.post(
            f"{url or self.running.url}/v1/chat/completions",
            json=body,
            headers={"x-extproc-debug": "true"},
        ) as answer:
            assert answer.status == 200, await answer.text()
            names = ("worker", "reason", "overlap")
            return {name: answer.headers.get(f"x-extproc-{name}", "") for name in names}


async def start(
    launch: Launch,
    tmp_path: Path,
    engine_template: str,
    engine: str = "sglang",
    **model: Any,
) -> Service:
    """Two workers with a template of their own; the service has CHATML."""
    ours, engines = tmp_path / "ours", tmp_path / "engines"
    ours.mkdir()
    engines.mkdir()
    path = model_folder(ours)
    running = await launch(
        2,
        worker={
            "engine": engine,
            "page_size": PAGE,
            "kv_events_port": 0,
            "tokenizer_path": model_folder(engines, engine_template),
        },
        settings={
            "models": [
                {"id": "m", "policy": "cache_aware_zmq", "tokenizer_path": path} | dict(model)
            ],
            "observability": {"debug_headers": True},
        },
    )
    return Service(running)


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
async def test_a_fleet_with_our_template_is_proven_and_stays_exact(
    launch: Launch, tmp_path: Path, engine: str
) -> None:
    service = await start(launch, tmp_path, CHATML, engine)
    await service.proven("proven", "proven")
    assert await service.running.sample('extproc_token_proof_workers{model="m",state="proven"') == 2
    for url in service.urls:
        found = await service.tokens(url)
        assert {"text", "chat", "conversation", "tools"} <= {*found["equal"]}
        assert (found["differences"], found["by_load"]) == ([], [])
    await service.chat(service.urls[1])
    await service.settled()
    shown = await service.chat()
    assert (shown["worker"], shown["reason"]) == (service.urls[1], "hit")


async def test_a_fleet_with_another_template_is_named_and_routed_by_load(
    launch: Launch, tmp_path: Path
) -> None:
    service = await start(launch, tmp_path, OTHER_TURNS)
    await service.proven("differs", "differs")
    found = await service.tokens(service.urls[0])
    assert found["reason"] == "other_template"
    assert "chat" in found["by_load"]
    assert "text" not in found["by_load"]
    (first,) = [one for one in found["differences"] if one["probe"] == "conversation"]
    assert "stem: " in first["engines"]["text"]
    assert "stem: " not in first["ours"]["text"]
    log = service.running.stack.service.log.read_text()
    assert "tokens_differ" in log
    assert "models[].tokenizer_path must have the chat template of the engine" in log
    await service.chat(service.urls[1])
    await service.settled()
    shown = await service.chat()
    assert shown["reason"] == "tokens_differ"
    counted = 'extproc_prompts_without_tokens_total{model="m",reason="tokens_differ"'
    assert await service.running.sample(counted) == 1


async def test_only_requests_with_tools_lose_their_tokens_where_only_tools_differ(
    launch: Launch, tmp_path: Path
) -> None:
    service = await start(launch, tmp_path, OTHER_TOOLS)
    await service.proven("differs", "differs")
    assert (await service.tokens(service.urls[0]))["by_load"] == ["tools"]
    await service.chat(service.urls[0])
    await service.settled()
    assert (await service.chat())["reason"] == "hit"
    assert (await service.chat(tools=TOOLS))["reason"] == "tokens_differ"


@pytest.mark.parametrize(("mode", "shown_as"), [("warn", "differs"), ("off", None)])
async def test_a_model_can_be_routed_by_its_tokens_whatever_differs(
    launch: Launch, tmp_path: Path, mode: str, shown_as: str | None
) -> None:
    service = await start(launch, tmp_path, OTHER_TURNS, token_proof=mode)
    await service.proven(shown_as, shown_as)
    assert (await service.chat())["reason"] == "below_threshold"


async def test_a_fleet_with_another_template_is_exact_where_its_engines_are_asked(
    launch: Launch, tmp_path: Path
) -> None:
    service = await start(launch, tmp_path, OTHER_TURNS, tokens_from="engine")
    await service.proven("differs", "differs")
    await service.chat(service.urls[1])
    await service.settled()
    # The first question may be late on a slow machine; its answer is kept.
    await service.chat()
    shown = await service.chat()
    assert (shown["worker"], shown["reason"]) == (service.urls[1], "hit")
    cached, total = map(int, shown["overlap"].split("/"))
    assert total - cached <= PAGE


async def test_a_worker_that_restarts_with_another_template_is_proven_again_at_once(
    launch: Launch, tmp_path: Path
) -> None:
    service = await start(launch, tmp_path, CHATML)
    await service.proven("proven", "proven")
    other = tmp_path / "other"
    other.mkdir()
    worker = service.running.fleet.workers[1]
    worker.use_tokenizer(model_folder(other, OTHER_TURNS))
    await worker.restart()
    await service.proven("proven", "differs")
    # The other worker's tokens still count.
    await service.chat(service.urls[0])
    await service.settled()
    shown = await service.chat()
    assert (shown["worker"], shown["reason"]) == (service.urls[0], "hit")
