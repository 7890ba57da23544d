"""The paths of a worker like vLLM: introspection, metrics, tokens and adapters."""

import asyncio
from typing import Any

import pytest

from extproc.simulator.settings import SimulatorSettings

from .clients import CHAT, Launch, SimulatedWorker, chat, endless


def vllm(**fields: Any) -> SimulatorSettings:
    defaults: dict[str, Any] = {
        "engine": "vllm",
        "model": "m",
        "prefill_tokens_per_second": 1e9,
        "decode_milliseconds_per_token": 0,
        "default_max_tokens": 2,
        "page_size": 16,
    }
    return SimulatorSettings(**(defaults | fields))


async def names(worker: SimulatedWorker) -> list[str]:
    _, models = await worker.get("/v1/models")
    return [card["id"] for card in models["data"]]


async def metrics(worker: SimulatedWorker) -> list[str]:
    status, text = await worker.get("/metrics")
    assert status == 200
    return [line for line in text.decode().splitlines() if not line.startswith("#")]


async def test_models(launch: Launch) -> None:
    worker = await launch(vllm(context_length=4096, lora=["sql"]))
    _, models = await worker.get("/v1/models")
    base, adapter = models["data"]
    assert (base["id"], base["owned_by"], base["max_model_len"]) == ("m", "vllm", 4096)
    assert (base["root"], base["parent"]) == ("m", None)
    assert (adapter["id"], adapter["root"], adapter["parent"]) == ("sql", "/adapters/sql", "m")
    assert adapter["max_model_len"] is None


async def test_paths_of_sglang_are_not_there(launch: Launch) -> None:
    worker = await launch(vllm())
    for path in ("/server_info", "/get_server_info", "/v1/loads", "/health_generate"):
        assert (await worker.get(path))[0] == 404
    for path in ("/generate", "/flush_cache", "/abort_request", "/reset_prefix_cache"):
        assert (await worker.post(path, {}))[0] == 404
    assert (await worker.get("/health"))[0] == 200
    assert (await worker.get("/version"))[1] == {"version": "0.32.0"}


async def test_development_mode(launch: Launch) -> None:
    worker = await launch(vllm(dev_mode=True))
    _, info = await worker.get("/server_info")
    assert set(info) == {"vllm_config", "vllm_env", "system_env"}
    assert (await worker.post("/reset_prefix_cache", b""))[0] == 200


async def test_kv_event_sources(launch: Launch) -> None:
    worker = await launch(vllm(kv_events_port=0, dp_size=2, kv_topic="kv"))
    ports = worker.simulator.kv_ports
    assert ports is not None
    assert ports.replay is not None
    assert ports.load is None
    _, sources = await worker.get("/kv_event_sources")
    assert set(sources) == {"0", "1"}
    assert sources["1"]["endpoint"] == f"tcp://*:{ports.events + 1}"
    assert sources["1"]["replay_endpoint"] == f"tcp://*:{ports.replay + 1}"
    assert sources["1"]["topic"] == "kv"


async def test_no_sources_without_kv_events(launch: Launch) -> None:
    worker = await launch(vllm())
    assert await worker.get("/kv_event_sources") == (200, {})


async def test_metrics(launch: Launch) -> None:
    worker = await launch(endless(**FIELDS, dp_size=2, max_running_requests=1))
    rank = {"X-Data-Parallel-Rank": "1"}
    tasks = [asyncio.ensure_future(worker.post(CHAT, chat(), headers=rank)) for _ in range(2)]
    await worker.until(running=1, waiting=1)
    lines = await metrics(worker)
    assert 'vllm:num_requests_running{engine="0",model_name="m"} 0.0' in lines
    assert 'vllm:num_requests_running{engine="1",model_name="m"} 1.0' in lines
    assert 'vllm:num_requests_waiting{engine="1",model_name="m"} 1.0' in lines
    (config, _) = [line for line in lines if line.startswith("vllm:cache_config_info")]
    assert 'block_size="16"' in config
    assert 'num_gpu_blocks="64"' in config
    for task in tasks:
        task.cancel()
    await worker.until(running=0, waiting=0)


FIELDS: dict[str, Any] = {
    "engine": "vllm",
    "model": "m",
    "page_size": 16,
    "max_total_num_tokens": 1024,
}


async def test_a_rank_in_the_body_is_ignored(launch: Launch) -> None:
    worker = await launch(vllm(dp_size=2))
    body = chat(routed_dp_rank=7, data_parallel_rank=7)
    assert (await worker.post(CHAT, body))[0] == 200
    status, _ = await worker.post(CHAT, body, headers={"X-data-parallel-rank": "2"})
    assert status == 400


@pytest.mark.parametrize(
    ("body", "count"),
    [
        ({"prompt": "four"}, 4),
        ({"messages": [{"role": "user", "content": "hello"}]}, len("userhelloassistant")),
    ],
)
async def test_tokens_are_those_of_the_inference_path(
    launch: Launch, body: dict[str, Any], count: int
) -> None:
    worker = await launch(vllm())
    status, answer = await worker.post("/tokenize", body | {"model": "m"})
    assert status == 200
    assert answer["count"] == len(answer["tokens"]) == count
    path = CHAT if "messages" in body else "/v1/completions"
    _, inferred = await worker.post(path, body)
    assert inferred["usage"]["prompt_tokens"] == count


async def test_tokens_of_nothing_are_refused(launch: Launch) -> None:
    worker = await launch(vllm())
    assert (await worker.post("/tokenize", {"model": "m"}))[0] == 400
    assert (await worker.post("/tokenize", {"model": "other", "prompt": "a"}))[0] == 404


async def test_adapters_are_models(launch: Launch) -> None:
    worker = await launch(vllm(lora=["sql"]))
    _, answer = await worker.post(CHAT, chat("a" * 40, model="sql"))
    assert answer["model"] == "sql"
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    _, base = await worker.post(CHAT, chat("a" * 40, model="m"))
    assert base["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    _, again = await worker.post(CHAT, chat("a" * 40, model="sql"))
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 48
    for name in ("other", "m:sql"):
        assert (await worker.post(CHAT, chat(model=name)))[0] == 404


async def test_adapters_are_loaded_and_unloaded(launch: Launch) -> None:
    worker = await launch(vllm())
    path = "/v1/load_lora_adapter"
    body = {"lora_name": "sql", "lora_path": "/somewhere"}
    async with worker.session.post(path, json=body) as response:
        assert response.status == 200
    assert await names(worker) == ["m", "sql"]
    assert (await worker.post(path, body))[0] == 400
    assert (await worker.post(path, body | {"lora_name": "m"}))[0] == 400
    async with worker.session.post("/v1/unload_lora_adapter", json=body) as response:
        assert response.status == 200
    assert await names(worker) == ["m"]
    assert (await worker.post("/v1/unload_lora_adapter", body))[0] == 404


async def test_a_restart_forgets_adapters_that_were_loaded(launch: Launch) -> None:
    worker = await launch(vllm(lora=["sql"]))
    body = {"lora_name": "other", "lora_path": "/somewhere"}
    async with worker.session.post("/v1/load_lora_adapter", json=body) as response:
        assert response.status == 200
    await worker.simulator.restart()
    assert await names(worker) == ["m", "sql"]


async def test_a_key_guards_only_the_paths_of_the_api(launch: Launch) -> None:
    worker = await launch(vllm(api_key="key"))
    assert (await worker.get("/v1/models"))[0] == 401
    for path in ("/health", "/version", "/metrics", "/kv_event_sources"):
        assert (await worker.get(path))[0] == 200


@pytest.mark.parametrize(
    "fields",
    [{"dev_mode": True}, {"engine": "vllm", "host_cache_tokens": 64}],
)
def test_settings_of_the_other_engine_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="vllm"):
        SimulatorSettings(**fields)
