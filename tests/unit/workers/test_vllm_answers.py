"""How vLLM is recognised and read: models, publishers of KV events, size of blocks."""

import asyncio
import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.worker_url import parse_worker_url
from extproc.workers.engine_calls import EngineAnswer, EngineTimeoutError
from extproc.workers.introspection import Introspection, introspect
from extproc.workers.vllm_answers import read_vllm_load
from extproc.workers.worker import KvEvents, WorkerSpec
from tests.builders import make_spec
from tests.fakes import FakeClock, FakeEngineClient

URL = "http://10.0.0.1:8000"
MODELS = {
    "object": "list",
    "data": [{"id": "m", "object": "model", "owned_by": "vllm", "root": "org/m", "parent": None}],
}
METRICS = b"""# HELP vllm:num_requests_running Number of requests.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="32",cache_dtype="auto",engine="0",name="a\\"b"} 1.0
"""


def source(port: int, replay: int | None = None, topic: str = "", **fields: Any) -> dict[str, Any]:
    """A publisher as vLLM names it."""
    return {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://*:{port}",
        "replay_endpoint": None if replay is None else f"tcp://*:{replay}",
        "buffer_steps": 10_000,
        "topic": topic,
    } | fields


def engine(sources: Any = None, metrics: bytes | None = METRICS) -> FakeEngineClient:
    """A vLLM engine: `sources` by rank, None for one that is too old to say."""
    client = FakeEngineClient()
    client.script(URL, "/server_info", EngineAnswer(404, b'{"detail":"Not Found"}'))
    client.script(URL, "/v1/models", EngineAnswer(200, json.dumps(MODELS).encode()))
    status = 404 if sources is None else 200
    body = sources if isinstance(sources, bytes) else json.dumps(sources).encode()
    client.script(URL, "/kv_event_sources", EngineAnswer(status, body))
    client.script(URL, "/metrics", EngineAnswer(404 if metrics is None else 200, metrics or b""))
    return client


async def ask(client: FakeEngineClient, known: WorkerSpec | None = None) -> Introspection:
    clock = FakeClock()
    work = introspect(client, parse_worker_url(URL), clock, 3, ranks_max=64, known=known)
    task = asyncio.create_task(work)
    await clock.advance(60.0)
    return await task


async def test_its_events_are_found_without_configuration() -> None:
    found = await ask(engine({"0": source(5557, 5558, "kv")}))
    assert (found.engine, found.model_ids, found.problem) == ("vllm", ("m",), "")
    assert found.kv_events == KvEvents(
        host="10.0.0.1", port=5557, block_size=32, topic="kv", replay_port=5558
    )


async def test_ranks_use_ports_in_a_row() -> None:
    found = await ask(engine({"1": source(5558, 6001), "0": source(5557, 6000)}))
    assert found.kv_events is not None
    events = found.kv_events
    assert (events.dp_size, events.port, events.replay_port) == (2, 5557, 6000)


async def test_a_server_of_one_rank_of_several_has_its_own_port() -> None:
    found = await ask(engine({"3": source(5560)}))
    assert found.kv_events is not None
    assert (found.kv_events.dp_size, found.kv_events.port) == (1, 5560)


@pytest.mark.parametrize("sources", [None, {}, b"null"])
async def test_an_engine_that_names_no_publishers_is_used_without(sources: Any) -> None:
    found = await ask(engine(sources))
    assert (found.engine, found.model_ids, found.kv_events) == ("vllm", ("m",), None)
    assert bool(found.kv_problem) is (sources == b"null")


@pytest.mark.parametrize(
    "sources",
    [
        b"[]",
        b"\xff",
        {"x": source(1)},
        {"0": {"endpoint": 5}},
        {"0": source(5557), "1": source(5559)},
        {"0": source(5557), "1": source(5558, 6000)},
        {"0": source(5557, topic="a"), "1": source(5558, topic="b")},
        {"0": source(5557, topic="x" * 257)},
        {"0": source(5557, endpoint="inproc://cache")},
        {"0": source(0)},
        {str(rank): source(5000 + rank) for rank in range(65)},
    ],
)
async def test_publishers_that_cannot_be_used_are_a_problem_of_events_alone(sources: Any) -> None:
    found = await ask(engine(sources))
    assert (found.model_ids, found.problem, found.kv_events) == (("m",), "", None)
    assert "/kv_event_sources" in found.kv_problem


async def test_an_answer_never_names_the_host() -> None:
    found = await ask(engine({"0": source(1, endpoint="tcp://evil.example:5557")}))
    assert found.kv_events is not None
    assert found.kv_events.host == "10.0.0.1"


@pytest.mark.parametrize(
    "metrics",
    [
        None,
        b"",
        b"\xff\xfe",
        b'\nvllm:cache_config_info{block_size="None"} 1.0\n',
        b'\nvllm:cache_config_info{block_size="0"} 1.0\n',
        b'\nvllm:cache_config_info{block_size="32" 1.0\n',
        b'\nvllm:cache_config_info{block_size="9999999"} 1.0\n',
    ],
)
async def test_without_a_block_size_it_is_the_default(metrics: bytes | None) -> None:
    found = await ask(engine({"0": source(5557)}, metrics))
    assert found.kv_events is not None
    assert found.kv_events.block_size == 16


async def test_a_known_engine_is_asked_only_what_can_change() -> None:
    client = engine({"0": source(5557)})
    first = await ask(client)
    spec = make_spec(URL, kv_events=first.kv_events, engine="vllm")
    client.calls.clear()
    assert (await ask(client, spec)).kv_events == first.kv_events
    assert client.asked(URL) == ["/v1/models", "/version", "/kv_event_sources"]


@pytest.mark.parametrize(
    ("answer", "version"),
    [
        (EngineAnswer(200, b'{"version": "0.32.0+cpu"}'), "0.32.0+cpu"),
        (EngineAnswer(200, b'{"version": 32}'), ""),
        (EngineAnswer(200, b'{"version": "0.32\\n"}'), ""),
        (EngineAnswer(200, b'{"version": "' + b"9" * 65 + b'"}'), ""),
        (EngineAnswer(200, b"[]"), ""),
        (EngineAnswer(200, b"\xff"), ""),
        (EngineAnswer(404, b""), ""),
    ],
)
async def test_the_version_is_read_if_the_engine_says_it(
    answer: EngineAnswer, version: str
) -> None:
    client = engine({"0": source(5557)})
    client.script(URL, "/version", answer)
    assert (await ask(client)).engine_version == version


async def test_an_engine_that_was_replaced_by_another_is_read_anew() -> None:
    client = FakeEngineClient()
    client.tell(URL, "m", disaggregation_mode="decode")
    models = {"data": [{"id": "m", "owned_by": "sglang"}]}
    client.script(URL, "/v1/models", EngineAnswer(200, json.dumps(models).encode()))
    found = await ask(client, make_spec(URL, engine="vllm"))
    assert (found.engine, found.role) == ("sglang", "decode")


async def test_the_server_info_of_the_development_mode_is_not_that_of_sglang() -> None:
    client = engine({"0": source(5557)})
    info = {"vllm_config": "model='m', …", "vllm_env": {}, "system_env": {}}
    client.script(URL, "/server_info", EngineAnswer(200, json.dumps(info).encode()))
    found = await ask(client)
    assert (found.engine, found.model_ids, found.problem) == ("vllm", ("m",), "")
    assert found.kv_events is not None


async def test_a_first_answer_that_takes_too_long_is_not_needed() -> None:
    client = engine({"0": source(5557)})
    client.script(URL, "/server_info", EngineTimeoutError("no answer in time"))
    found = await ask(client)
    assert (found.engine, found.model_ids, found.unanswered) == ("vllm", ("m",), False)


async def test_an_engine_that_is_silent_on_every_path_is_unanswered() -> None:
    client = engine()
    for path in ("/server_info", "/v1/models"):
        client.script(URL, path, EngineTimeoutError("no answer in time"))
    found = await ask(client)
    assert found.unanswered
    assert found.problem == "/server_info: no answer in time"


LOAD = b"""# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 0.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:num_requests_waiting{engine="1",model_name="m"} 0.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.0
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="1000"} 1.0
vllm:cache_config_info{block_size="16",engine="1",num_gpu_blocks="1000"} 1.0
"""


def test_the_load_of_each_rank_is_read() -> None:
    first, second = read_vllm_load(LOAD)[0], read_vllm_load(LOAD)[1]
    assert (first.num_running_reqs, first.num_waiting_reqs) == (3, 2)
    assert (first.num_tokens, first.max_total_num_tokens) == (4000, 16_000)
    assert (second.num_running_reqs, second.num_tokens) == (0, 0)


def test_the_usage_has_another_name_in_older_versions() -> None:
    older = LOAD.replace(b"vllm:kv_cache_usage_perc", b"vllm:gpu_cache_usage_perc")
    assert read_vllm_load(older) == read_vllm_load(LOAD)


@pytest.mark.parametrize("blocks", [b"None", b"-3", b"9" * 13, b"1.5"])
def test_a_capacity_that_is_no_number_is_not_known(blocks: bytes) -> None:
    found = read_vllm_load(LOAD.replace(b'num_gpu_blocks="1000"', b'num_gpu_blocks="%b"' % blocks))
    assert (found[0].num_running_reqs, found[0].max_total_num_tokens) == (3, 0)


@pytest.mark.parametrize(
    "page", [b"", b"\xff", b"<html>", LOAD.replace(b"3.0", b"NaN"), LOAD.replace(b"} 3.0", b" 3")]
)
def test_a_page_without_figures_gives_no_load(page: bytes) -> None:
    assert 0 not in read_vllm_load(page)


@pytest.mark.parametrize(
    "line",
    [
        b'vllm:num_requests_running{a="1", ="x"} 1',
        b'vllm:num_requests_running{engine="0"}',
        b'vllm:num_requests_running{engine="0"} ',
        b"vllm:num_requests_running{",
        b'vllm:num_requests_running{engine="0"} 1e308',
    ],
)
def test_a_line_that_cannot_be_read_is_left_out(line: bytes) -> None:
    assert 0 not in read_vllm_load(b"\n" + line + b"\n")


@pytest.mark.parametrize(
    "line",
    [
        b",".join(b'l%d="1"' % n for n in range(400)),
        b'a="' + b'\\"' * 1900 + b'"',
        b'a="' + b"{" * 4000 + b'"',
        b"=" * 4000,
        b'"' * 4000,
    ],
)
def test_lines_that_are_made_to_be_slow_are_not(line: bytes) -> None:
    page = b"".join(
        b"\n%b{%b} 1" % (name, line)
        for name in (b"vllm:num_requests_running", b"vllm:cache_config_info")
        for _ in range(250)
    )
    began = time.process_time()
    read_vllm_load(page)
    # Two hundred times as fast as a parser of the whole format, on the slowest of machines.
    assert time.process_time() - began < 0.5


def test_a_page_of_several_megabytes_is_not_read() -> None:
    assert read_vllm_load(LOAD + b"x" * (2 << 20)) == {}


@given(st.binary(max_size=200) | st.binary(max_size=40).map(lambda some: LOAD + some + LOAD))
def test_no_page_raises(page: bytes) -> None:
    for load in read_vllm_load(page).values():
        assert 0 <= load.num_tokens <= load.max_total_num_tokens
