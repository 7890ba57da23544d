"""Requests follow the KV pages that workers publish: real Envoy, real ZMQ, real HTTP."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from extproc.testing.stack import wait_until
from tests.e2e.conftest import Launch, Running
from tests.e2e.test_gateway_modes import MODES, with_modes
from tests.e2e.test_retry_elsewhere import set_faults
from tests.unit.simulator.model_folders import model_folder

PAGE = 16
DEBUG = {"x-extproc-debug": "true"}
# A token is a byte, but for the four marks of the template.
LONG = "The tide comes in and the tide goes out. " * 20


class Pool:
    """Workers of one model behind a stack whose policy looks at KV pages."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self.urls = [worker.url for worker in running.fleet.workers]

    async def post(
        self,
        path: str,
        body: dict[str, Any],
        url: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """The answer and the debug headers, from Envoy or from one worker."""
        async with self.running.http.post(
            f"{url or self.running.url}{path}",
            json={"model": "m"} | body,
            headers=DEBUG | (headers or {}),
        ) as answer:
            assert answer.status == 200, await answer.text()
            names = ("worker", "reason", "overlap", "policy")
            shown = {name: answer.headers.get(f"x-extproc-{name}", "") for name in names}
            return await answer.json(), shown

    async def chat(
        self, text: str, url: str | None = None, **fields: Any
    ) -> tuple[dict[str, Any], dict[str, str]]:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 2}
        return await self.post("/v1/chat/completions", body | fields, url)

    async def ranks(self) -> list[dict[str, Any]]:
        """The service's view of every rank, in the order of workers."""
        by_url = {worker["url"]: worker for worker in await self.running.stack.workers()}
        return [rank for url in self.urls for rank in by_url[url]["kv"]["ranks"]]

    async def settled(self) -> None:
        """Wait until the service knows every page that the workers hold."""

        async def check() -> bool:
            ranks = await self.ranks()
            stats = await self.running.fleet.stats()
            held = [cache["gpu_tokens"] // PAGE for one in stats for cache in one["caches"]]
            return (
                all(rank["trusted"] for rank in ranks) and [rank["pages"] for rank in ranks] == held
            )

        await wait_until(check, "the service knows what the workers hold")


StartPool = Callable[..., Any]


@pytest.fixture
def pool(launch: Launch, tmp_path: Path) -> StartPool:
    async def start(
        workers: int = 2,
        policy: str = "cache_aware_zmq",
        *,
        worker: dict[str, Any] | None = None,
        model: dict[str, Any] | None = None,
        **more: Any,
    ) -> Pool:
        folder = tmp_path / "model"
        folder.mkdir()
        path = model_folder(folder)
        settings = {"page_size": PAGE, "kv_events_port": 0, "tokenizer_path": path}
        started = Pool(
            await launch(
                workers,
                worker=settings | (worker or {}),
                settings={
                    "models": [
                        {"id": "m", "policy": policy, "tokenizer_path": path, **(model or {})}
                    ],
                    "observability": {"debug_headers": True},
                },
                **more,
            )
        )
        await started.settled()
        return started

    return start


@pytest.mark.parametrize("policy", ["cache_aware_zmq", "min_ttft"])
async def test_a_chat_goes_where_its_prefix_was_stored(pool: StartPool, policy: str) -> None:
    """Content is tested, not convergence: each worker is warmed directly, with its own text."""
    fleet = await pool(3, policy)
    texts = [f"{number} {LONG}" for number in range(3)]
    for text, url in zip(texts, fleet.urls, strict=True):
        await fleet.chat(text, url)
    await fleet.settled()
    for text, url in [*zip(texts, fleet.urls, strict=True)] * 2:
        body, shown = await fleet.chat(text)
        assert shown["worker"] == url
        assert shown["reason"] == "hit"
        assert shown["policy"] == policy
        usage = body["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        # The engine and the service count the same pages of the same tokens.
        assert cached > 800
        assert shown["overlap"] == f"{cached}/{usage['prompt_tokens']}"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": LONG}),
        ("/v1/completions", {"prompt": list(range(200))}),
        ("/generate", {"text": LONG}),
        ("/generate", {"input_ids": list(range(200))}),
    ],
)
async def test_completions_and_generate_are_routed_by_tokens(
    pool: StartPool, path: str, body: dict[str, Any]
) -> None:
    fleet = await pool(2)
    limit = {"sampling_params": {"max_new_tokens": 2}} if path == "/generate" else {"max_tokens": 2}
    await fleet.post(path, body | limit, fleet.urls[1])
    await fleet.settled()
    _, shown = await fleet.post(path, body | limit)
    assert (shown["worker"], shown["reason"]) == (fleet.urls[1], "hit")


async def test_evicted_pages_no_longer_attract_requests(pool: StartPool) -> None:
    fleet = await pool(2)
    await fleet.chat(LONG, fleet.urls[1])
    await fleet.settled()
    assert (await fleet.chat(LONG))[1]["reason"] == "hit"
    await fleet.running.http.post(f"{fleet.urls[1]}/flush_cache")
    await fleet.settled()
    _, shown = await fleet.chat(LONG)
    assert shown["reason"] == "below_threshold"
    assert shown["overlap"].startswith("0/")


async def test_a_restarted_engine_holds_no_pages(pool: StartPool) -> None:
    fleet = await pool(2)
    await fleet.chat(LONG, fleet.urls[0])
    await fleet.settled()
    await fleet.running.fleet.workers[0].restart()
    await fleet.settled()
    _, shown = await fleet.chat(LONG)
    assert shown["overlap"].startswith("0/")
    assert (await fleet.ranks())[0]["trusted"]


async def test_namespaces_do_not_share_pages(pool: StartPool) -> None:
    fleet = await pool(2)
    await fleet.chat(LONG, fleet.urls[1], cache_salt="tenant-a")
    await fleet.settled()
    assert (await fleet.chat(LONG, cache_salt="tenant-a"))[1]["reason"] == "hit"
    for salt in ({}, {"cache_salt": "tenant-b"}):
        assert (await fleet.chat("B" + LONG, **salt))[1]["overlap"].startswith("0/")
        _, shown = await fleet.chat(LONG, **salt)
        assert shown["overlap"].startswith("0/") or shown["worker"] != fleet.urls[1]


@pytest.mark.parametrize("mode", ["buffered", "partial", "streamed", "duplex", "duplex-both"])
async def test_the_engine_learns_which_rank_holds_the_prefix(pool: StartPool, mode: str) -> None:
    edit = None if mode == "buffered" else with_modes(**MODES[mode])
    fleet = await pool(
        1, worker={"dp_size": 4, "prefill_tokens_per_second": 1e9}, edit_bootstrap=edit
    )
    await fleet.chat(LONG, fleet.urls[0], routed_dp_rank=2)
    await fleet.settled()
    # The client's own choice has no effect.
    for fields in ({}, {"routed_dp_rank": 1}):
        body, shown = await fleet.chat(LONG, **fields)
        assert shown["reason"] == "hit"
        assert body["usage"]["prompt_tokens_details"]["cached_tokens"] > 800
    message = {"role": "user", "content": LONG}
    body, _ = await fleet.post(
        "/v1/chat/completions",
        {"messages": [message], "max_tokens": 2},
        headers={"x-data-parallel-rank": "1"},
    )
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] > 800
    requests = await fleet.running.fleet.requests()
    assert [request["rank"] for request in requests] == [2, 2, 2, 2]
    # A body of several pieces in the modes that stream them.
    pad = "x" * 300_000
    body, shown = await fleet.chat(pad)
    assert body["usage"]["prompt_tokens"] > 300_000


async def test_without_a_visible_body_load_decides(pool: StartPool) -> None:
    fleet = await pool(2, edit_bootstrap=with_modes(**MODES["none"]))
    _, shown = await fleet.chat(LONG)
    assert shown["reason"] == "no_tokens"


async def test_a_chat_template_without_end_leaves_requests_routed_by_load(
    pool: StartPool, tmp_path: Path
) -> None:
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    again = "{% set ns.l = [ns.l, ns.l] %}"
    template = (
        "{% if messages | length > 1 %}{% set ns = namespace(l=[1]) %}"
        f"{{% for n in range(9999) %}}{again}{{% endfor %}}{{{{ ns.l }}}}{{% endif %}}"
        "{{ messages[0].content }}"
    )
    path = model_folder(hostile, template)
    fleet = await pool(2, model={"tokenizer_path": path})
    messages = [{"role": "user", "content": LONG}]
    _, shown = await fleet.chat("", messages=messages * 2)
    assert shown["reason"] == "no_tokens"
    metrics = await fleet.running.stack.metrics()
    name = 'extproc_prompts_without_tokens_total{model="m",reason="template_limit"}'
    assert metrics[name] == 1
    # The service is well.
    _, shown = await fleet.chat("", messages=messages)
    assert shown["reason"] != "no_tokens"


async def test_requests_with_the_same_new_prefix_go_to_one_worker(pool: StartPool) -> None:
    """No worker holds the prefix yet: the first request is in prefill when others come."""
    fleet = await pool(4, "min_ttft", worker={"prefill_tokens_per_second": 2000.0})
    first = asyncio.create_task(fleet.chat(LONG, stream=False))
    await asyncio.sleep(0.1)
    shown = [(await first)[1]]
    rest = await asyncio.gather(*(fleet.chat(LONG + str(number)) for number in range(2)))
    shown += [one for _, one in rest]
    assert len({one["worker"] for one in shown}) == 1


async def test_kv_events_are_followed_by_configuration_when_workers_do_not_announce_them(
    launch: Launch, tmp_path: Path
) -> None:
    """As with vLLM: there is no /server_info, so the configuration names the ports."""
    folder = tmp_path / "model"
    folder.mkdir()
    path = model_folder(folder)

    def entries(workers: list[Any]) -> list[dict[str, Any]]:
        return [
            {
                "url": worker.url,
                "endpoint": f"tcp://*:{worker.kv_ports.events}",
                "replay_endpoint": f"tcp://*:{worker.kv_ports.replay}",
                "block_size": PAGE,
            }
            for worker in workers
        ]

    running = await launch(
        2,
        worker={
            "page_size": PAGE,
            "kv_events_port": 0,
            "tokenizer_path": path,
            "no_server_info": True,
            "wire_format": "array",
        },
        settings=lambda workers: {
            "models": [
                {
                    "id": "m",
                    "policy": "cache_aware_zmq",
                    "tokenizer_path": path,
                    "kv_events": entries(workers),
                }
            ],
            "observability": {"debug_headers": True},
        },
    )
    fleet = Pool(running)
    await fleet.settled()
    await fleet.chat(LONG, fleet.urls[1])
    await fleet.settled()
    assert (await fleet.chat(LONG))[1]["worker"] == fleet.urls[1]


async def test_clients_can_count_tokens(pool: StartPool) -> None:
    fleet = await pool(1)
    body, _ = await fleet.post("/v1/tokenize", {"prompt": "héllo"})
    assert body["model"] == "m"
    assert body["count"] == len(body["tokens"]) == 6
    body, _ = await fleet.post("/v1/detokenize", {"tokens": body["tokens"]})
    assert body == {"model": "m", "text": "héllo"}
    messages = [{"role": "user", "content": "héllo"}]
    body, _ = await fleet.post("/v1/tokenize", {"messages": messages})
    text, _ = await fleet.post("/v1/detokenize", {"tokens": body["tokens"]})
    assert "user" in text["text"]
    assert "héllo" in text["text"]
    chat, _ = await fleet.chat("héllo")
    assert body["count"] == chat["usage"]["prompt_tokens"]
    for path, wrong, expected in (
        ("/v1/tokenize", {"prompt": 5}, (400, "bad_request")),
        ("/v1/tokenize", {"prompt": "a", "more": 1}, (400, "bad_request")),
        ("/v1/tokenize", {"prompt": "a", "messages": messages}, (400, "bad_request")),
        ("/v1/tokenize", {}, (400, "bad_request")),
        ("/v1/tokenize", {"messages": [{"role": "user", "content": 5}]}, (400, "bad_request")),
        ("/v1/tokenize", {"prompt": "a", "model": "other"}, (404, "model_not_found")),
        ("/v1/detokenize", {"tokens": [1 << 30]}, (400, "bad_request")),
        ("/v1/detokenize", {"tokens": ["a"]}, (400, "bad_request")),
    ):
        async with fleet.running.http.post(
            f"{fleet.running.url}{path}", json={"model": "m"} | wrong
        ) as answer:
            assert await fleet.running.error(answer) == expected


async def test_a_model_without_a_tokenizer_counts_no_tokens(launch: Launch) -> None:
    running = await launch(1)
    async with running.http.post(
        f"{running.url}/v1/tokenize", json={"model": "m", "prompt": "a"}
    ) as answer:
        assert await running.error(answer) == (404, "tokenizer_not_configured")


@pytest.mark.parametrize("how", ["busy", "refused"])
async def test_worker_and_overlap_speak_of_the_worker_that_served(
    pool: StartPool, how: str
) -> None:
    fleet = await pool(2)
    first, second = fleet.running.fleet.workers
    await fleet.chat(LONG, first.url)
    await fleet.chat(LONG[:400], second.url)
    await fleet.settled()
    if how == "busy":
        await set_faults(first, status=503)
    else:
        await first.stop()
    body, shown = await fleet.chat(LONG)
    assert shown["worker"] == second.url
    if how == "busy":
        assert shown["reason"] == "hit"  # of the decision, which was for the first
    usage = body["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert 300 < cached < 450
    assert shown["overlap"] == f"{cached}/{usage['prompt_tokens']}"


async def test_there_is_no_overlap_where_no_worker_served(pool: StartPool) -> None:
    fleet = await pool(2)
    await fleet.chat(LONG, fleet.urls[0])
    await fleet.settled()
    for worker in fleet.running.fleet.workers:
        await worker.stop()
    async with fleet.running.chat(
        headers=DEBUG, messages=[{"role": "user", "content": LONG}]
    ) as answer:
        assert await fleet.running.error(answer) == (503, "upstream_unreachable")
        shown = answer.headers["x-extproc-worker"], answer.headers["x-extproc-overlap"]
        assert shown == ("unknown", "0/0")


async def test_a_refused_first_choice_leaves_no_load_behind(pool: StartPool) -> None:
    fleet = await pool(2, worker={"dp_size": 2})
    await fleet.chat(LONG, fleet.urls[0], routed_dp_rank=1)
    await fleet.settled()
    await fleet.running.fleet.workers[0].stop()
    body, shown = await fleet.chat(LONG)
    assert shown["worker"] == fleet.urls[1]
    assert body["usage"]["prompt_tokens"] > 800

    async def idle() -> bool:
        workers = await fleet.running.stack.workers()
        return all(
            worker["in_flight"] == 0
            and all(rank["in_flight"] == 0 for rank in worker["kv"]["ranks"])
            for worker in workers
        )

    await wait_until(idle, "all load released")
    assert not (await fleet.ranks())[0]["trusted"]
