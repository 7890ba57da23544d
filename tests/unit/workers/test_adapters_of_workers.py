"""Adapters that engines load and unload, as the manager notices them."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from structlog.testing import capture_logs

from extproc.config.models import ModelConfig
from extproc.workers.engine_calls import EngineAnswer, EngineUnreachableError
from extproc.workers.source import Added, Removed
from tests.builders import make_spec
from tests.unit.workers.manager_setup import MODELS, A, B, ManagerSetup, running

LIST = "/v1/models"


def answer(*adapters: str, base: str = "m", owner: str = "vllm") -> EngineAnswer:
    cards: list[dict[str, Any]] = [{"id": base, "parent": None, "owned_by": owner}]
    cards += [{"id": name, "parent": base, "owned_by": owner} for name in adapters]
    return EngineAnswer(200, json.dumps({"object": "list", "data": cards}).encode())


def vllm(setup: ManagerSetup, url: str, *adapters: str) -> None:
    setup.client.script(url, "/server_info", EngineAnswer(404, b""))
    setup.client.script(url, "/kv_event_sources", EngineAnswer(404, b""))
    setup.client.script(url, LIST, answer(*adapters))


def sglang(setup: ManagerSetup, url: str, *adapters: str, enable_lora: Any = True) -> None:
    setup.client.tell(url, "m", enable_lora=enable_lora)
    setup.client.script(url, LIST, answer(*adapters, owner="sglang"))


async def join(setup: ManagerSetup, *urls: str) -> None:
    setup.registry.names.serve(["m", "n"])
    await setup.deliver(*(Added(make_spec(url)) for url in urls))


def adapters_of(setup: ManagerSetup, url: str = A) -> set[str]:
    return set(setup.worker(url).adapters)


@pytest.mark.parametrize("engine", [vllm, sglang])
async def test_adapters_are_known_when_a_worker_joins(engine: Any) -> None:
    async with running(ManagerSetup()) as setup:
        engine(setup, A, "sql", "chat")
        await join(setup, A)
        assert adapters_of(setup) == {"sql", "chat"}
        assert setup.worker(A).model_ids == ("m",)
        assert setup.registry.names.find("sql") == ("m", "sql")


@pytest.mark.parametrize("engine", [vllm, sglang])
async def test_loading_and_unloading_is_noticed_within_seven_seconds(engine: Any) -> None:
    async with running(ManagerSetup()) as setup:
        engine(setup, A, "sql")
        await join(setup, A)
        worker = setup.worker(A)
        with capture_logs() as logs:
            engine(setup, A, "chat")
            await setup.clock.advance(7.0)
            assert adapters_of(setup) == {"chat"}
            assert setup.registry.names.find("sql") is None
            engine(setup, A)
            await setup.clock.advance(7.0)
            assert adapters_of(setup) == set()
        # The worker is the same: its load, its breaker and its pages stay.
        assert setup.worker(A) is worker
        changes = [log for log in logs if log["event"] == "worker_adapters_changed"]
        assert [(log["loaded"], log["unloaded"], log["count"]) for log in changes] == [
            ("chat", "sql", 1),
            ("", "chat", 0),
        ]
        assert setup.metric("extproc_adapter_polls_total", outcome="answered") >= 2


async def test_sglang_without_adapters_is_not_asked_for_them() -> None:
    async with running(ManagerSetup()) as setup:
        sglang(setup, A, enable_lora=False)
        sglang(setup, B, enable_lora="yes")
        await join(setup, A, B)
        await setup.clock.advance(30.0)
        assert LIST not in setup.client.asked(A)
        assert LIST not in setup.client.asked(B)


@pytest.mark.parametrize(
    "bad",
    [EngineAnswer(500, b""), EngineAnswer(200, b"{"), EngineUnreachableError("late")],
)
async def test_adapters_stay_while_the_list_cannot_be_read(bad: Any) -> None:
    async with running(ManagerSetup()) as setup:
        sglang(setup, A, "sql")
        await join(setup, A)
        setup.client.script(A, LIST, bad)
        await setup.clock.advance(7.0)
        assert adapters_of(setup) == {"sql"}
        assert setup.metric("extproc_adapter_polls_total", outcome="failed") >= 1
        setup.manager.recheck(setup.worker(A))
        await setup.clock.advance(0.0)
        assert adapters_of(setup) == {"sql"}


async def test_a_recheck_notices_an_adapter_at_once() -> None:
    async with running(ManagerSetup()) as setup:
        vllm(setup, A, "sql")
        await join(setup, A)
        vllm(setup, A)
        setup.manager.recheck(setup.worker(A))
        await setup.clock.advance(0.0)
        assert adapters_of(setup) == set()


async def test_adapters_of_a_worker_that_left_are_dropped() -> None:
    async with running(ManagerSetup()) as setup:
        vllm(setup, A, "sql")
        await join(setup, A)
        setup.registry.names.find("sql")
        await setup.deliver(Removed(A))
        sizes = setup.registry.names.sizes()
        assert (sizes["workers"], sizes["adapters"], sizes["found"]) == (0, 0, 2)
        asked = len(setup.client.asked(A))
        await setup.clock.advance(30.0)
        assert len(setup.client.asked(A)) == asked


async def test_an_adapter_with_the_name_of_a_configured_model_serves_it() -> None:
    models: Sequence[ModelConfig] = (*MODELS, ModelConfig(id="sql"))
    async with running(ManagerSetup(models)) as setup:
        vllm(setup, A, "sql")
        await join(setup, A)
        assert setup.worker(A).model_ids == ("m", "sql")
        assert setup.pool("sql") == [A]
        vllm(setup, A)
        await setup.clock.advance(7.0)
        assert setup.pool("sql") == []
        assert setup.pool("m") == [A]
        vllm(setup, A, "sql")
        await setup.clock.advance(7.0)
        assert setup.pool("sql") == [A]


async def test_a_reload_makes_a_model_of_an_adapter() -> None:
    async with running(ManagerSetup()) as setup:
        vllm(setup, A, "sql")
        await join(setup, A)
        settings = setup.manager._settings
        setup.manager.reconfigure((*MODELS, ModelConfig(id="sql")), settings)
        await setup.clock.advance(0.0)
        assert setup.pool("sql") == [A]
        setup.manager.reconfigure(MODELS, settings)
        await setup.clock.advance(0.0)
        assert setup.pool("sql") == []
        assert adapters_of(setup) == {"sql"}


async def test_ten_thousand_adapters_are_cut_and_said_once() -> None:
    async with running(ManagerSetup()) as setup:
        vllm(setup, A, *(f"a{n}" for n in range(10_000)))
        with capture_logs() as logs:
            await join(setup, A)
            for _ in range(3):
                setup.manager.recheck(setup.worker(A))
                await setup.clock.advance(2.0)
        assert len(adapters_of(setup)) == 1024
        said = [log for log in logs if log["event"] == "worker_adapters_left_out"]
        assert [log["count"] for log in said] == [10_000 - 1024]


async def test_questions_are_spread_over_time() -> None:
    urls = [f"http://10.0.1.{n}:8000" for n in range(200)]
    async with running(ManagerSetup()) as setup:
        for url in urls:
            vllm(setup, url)
        await join(setup, *urls)
        before = len(setup.client.calls)
        await setup.clock.advance(20.0)
        asked = [url for url, path, _ in setup.client.calls[before:] if path == LIST]
        assert 200 <= len(asked) <= 400
        assert len(set(asked)) == 200
