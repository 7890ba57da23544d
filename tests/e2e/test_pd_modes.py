"""Prefill and decode workers with other gateways, other engines and several replicas."""

import asyncio
import contextlib
import copy
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from extproc.testing.stack import ManagedProcess, reserved_ports, wait_until
from tests.e2e.pd_fleet import PdRunning, pd_stack
from tests.e2e.test_gateway_modes import MODES, with_modes
from tests.unit.simulator.model_folders import model_folder

VISIBLE = ["partial", "streamed", "duplex", "duplex-both", "headers-only-response"]
PAGE = 16
LONG = "The tide comes in and the tide goes out. " * 20


@pytest.mark.parametrize("decode", ["two_pass", "inline"])
@pytest.mark.parametrize("mode", VISIBLE)
async def test_pairs_in_every_body_mode(tmp_path: Path, mode: str, decode: str) -> None:
    async with pd_stack(
        tmp_path,
        worker={"prefill_tokens_per_second": 1e9},
        settings={"pd": {"decode": decode, "prefill_linger_secs": 1}},
        edit_bootstrap=with_modes(**MODES[mode]),
    ) as running:
        for index in range(4):
            content = "x" * (200_000 if index % 2 else 10)
            messages = [{"role": "user", "content": content}]
            async with running.chat(stream=index < 2, tokens=9, messages=messages) as response:
                text = await response.text()
                assert response.status == 200, text
                if index < 2:
                    assert text.count("data: ") == 12
        rooms = [leg["bootstrap_room"] for leg in await running.legs(running.prefills)]
        assert rooms == [leg["bootstrap_room"] for leg in await running.legs(running.decodes)]
        assert len(set(rooms)) == 4
        await running.fault(running.prefills[0], status=500)
        async with running.chat() as response:
            assert await running.error(response) == (502, "prefill_failed")
        await running.at_rest()


async def test_without_a_visible_body_pairs_are_refused(tmp_path: Path) -> None:
    unseen = with_modes(**MODES["none"])
    async with pd_stack(tmp_path, edit_bootstrap=unseen) as running, running.chat() as response:
        assert await running.error(response) == (503, "body_mode_unsupported")


async def test_pairs_work_in_a_gateway_with_one_destination(tmp_path: Path) -> None:
    settings = {"pd": {"decode": "inline"}, "envoy": {"destination": "single"}}
    async with pd_stack(tmp_path, decodes=3, settings=settings) as running:
        async with running.chat() as response:
            assert response.status == 200, await response.text()
        (leg,) = await running.legs(running.decodes)
        assert "," not in leg["headers"]["x-gateway-destination-endpoint"]


# -- several replicas


@contextlib.asynccontextmanager
async def two_replicas(tmp_path: Path, **more: Any) -> AsyncIterator[PdRunning]:
    """The first pass asks one replica, the attempts of the second pass ask two in turn."""
    with reserved_ports(2) as ports:
        async with _two_replicas(tmp_path, *ports, **more) as running:
            yield running


@contextlib.asynccontextmanager
async def _two_replicas(
    tmp_path: Path, grpc_port: int, admin_port: int, **more: Any
) -> AsyncIterator[PdRunning]:
    def edit(bootstrap: dict[str, Any]) -> None:
        clusters = bootstrap["static_resources"]["clusters"]
        (ours,) = [cluster for cluster in clusters if cluster["name"] == "extproc"]
        both = copy.deepcopy(ours)
        both["name"] = both["load_assignment"]["cluster_name"] = "both"
        endpoints = both["load_assignment"]["endpoints"][0]["lb_endpoints"]
        endpoints.append(copy.deepcopy(endpoints[0]))
        address = endpoints[1]["endpoint"]["address"]["socket_address"]
        address["port_value"] = grpc_port
        clusters.append(both)
        listener = bootstrap["static_resources"]["listeners"][1]
        manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
        asking = manager["http_filters"][-2]["typed_config"]
        asking["grpc_service"]["envoy_grpc"]["cluster_name"] = "both"

    async with pd_stack(tmp_path, edit_bootstrap=edit, **more) as running:
        config = copy.deepcopy(running.stack.config)
        config["server"] |= {"port": grpc_port, "admin_port": admin_port}
        file = tmp_path / "second.yaml"
        file.write_text(yaml.safe_dump(config))
        second = ManagedProcess(
            "second",
            [sys.executable, "-m", "extproc", "serve", "--config", str(file)],
            tmp_path / "second.log",
        )
        await second.start()
        try:

            async def ready() -> bool:
                with contextlib.suppress(OSError):
                    url = f"{running.stack.envoy_admin_url}/clusters?format=json"
                    async with running.http.get(url) as answer:
                        found = json.loads(await answer.text())["cluster_statuses"]
                    hosts = next(one for one in found if one["name"] == "both")["host_statuses"]
                    return len(hosts) == 2 and all(
                        "failed_active_health_check" not in host["health_status"] for host in hosts
                    )
                return False

            await wait_until(ready, "both replicas answer")
            yield running
        finally:
            await second.stop()


async def test_attempts_on_different_replicas_try_different_workers(tmp_path: Path) -> None:
    """Two of three decode workers are dead, and no replica learns it: three attempts suffice."""
    patient = {"circuit_breaker": {"threshold": 1000}}
    async with two_replicas(tmp_path, decodes=3, model=patient) as running:
        for worker in running.decodes[:2]:
            await worker.stop()
            running.fleet.workers.remove(worker)
        for number in range(40):
            async with running.chat(stream=number % 2 == 0) as response:
                assert response.status == 200, (number, await response.text())
        await running.at_rest()


async def test_a_second_pass_on_another_replica(tmp_path: Path) -> None:
    async with two_replicas(tmp_path, prefills=2, decodes=3) as running:

        async def send() -> None:
            async with running.chat(tokens=10) as response:
                assert response.status == 200, await response.text()

        await asyncio.gather(*(send() for _ in range(60)))
        counts = [len(await running.legs([worker])) for worker in running.decodes]
        assert min(counts) >= 10, counts
        await running.at_rest()


# -- KV-aware prefill


def model_of(tmp_path: Path) -> str:
    folder = tmp_path / "model"
    folder.mkdir()
    return str(model_folder(folder))


async def test_the_prefill_goes_where_the_prefix_is(tmp_path: Path) -> None:
    folder = model_of(tmp_path)
    worker = {
        "tokenizer_path": folder,
        "page_size": PAGE,
        "kv_events_port": 0,
        "dp_size": 2,
        "prefill_tokens_per_second": 1e9,
    }
    model = {"policy": "cache_aware_zmq", "tokenizer_path": folder}
    settings = {"observability": {"debug_headers": True}}
    async with pd_stack(
        tmp_path, prefills=2, decodes=2, worker=worker, model=model, settings=settings
    ) as running:

        async def ask(text: str) -> tuple[str, str]:
            messages = [{"role": "user", "content": text}]
            headers = {"x-extproc-debug": "true"}
            async with running.chat(messages=messages, tokens=2, headers=headers) as response:
                assert response.status == 200, await response.text()
                return response.headers["x-extproc-worker"], response.headers["x-extproc-reason"]

        for number in range(4):
            text = f"{number} {LONG}"
            first, _ = await ask(text)
            (holder,) = [one for one in running.prefills if one.url == first]
            rank = (await running.legs([holder]))[-1]["rank"]
            await running.kv_settled(PAGE)
            for turn in range(3):
                assert await ask(f"{text} and then {turn}") == (first, "hit")
                leg = (await running.legs([holder]))[-1]
                # Both sides derive the rank from the room.
                assert leg["rank"] == rank == leg["bootstrap_room"] % 2
                assert leg["cached_tokens"] > 500
        await running.at_rest()


# -- vLLM


@contextlib.asynccontextmanager
async def vllm(tmp_path: Path, **more: Any) -> AsyncIterator[PdRunning]:
    """Workers that do not announce their roles; the configuration names them."""
    found: list[str] = []
    decodes = more.get("decodes", 1)

    def urls(all_of_them: list[str]) -> list[str]:
        found.extend(all_of_them)
        return all_of_them

    roles: dict[str, Any] = {}
    worker = {"pd_protocol": "nixl", "no_server_info": True} | more.pop("worker", {})
    model = {"pd": {"protocol": "nixl"}} | more.pop("model", {})
    settings: dict[str, Any] = more.pop("settings", {})
    settings["discovery"] = {"static_urls": roles}

    def with_roles(all_of_them: list[str]) -> list[str]:
        roles["prefill_urls"] = all_of_them[:-decodes]
        roles["decode_urls"] = all_of_them[-decodes:]
        return urls(all_of_them)

    async with pd_stack(
        tmp_path, worker=worker, model=model, settings=settings, urls=with_roles, **more
    ) as running:
        yield running


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("decode", ["two_pass", "inline"])
async def test_a_nixl_pair_serves_a_request(tmp_path: Path, decode: str, stream: bool) -> None:
    async with vllm(tmp_path, settings={"pd": {"decode": decode}}) as running:
        usage: dict[str, Any] = {"stream_options": {"include_usage": True}} if stream else {}
        async with running.chat(tokens=7, stream=stream, min_tokens=3, **usage) as response:
            text = await response.text()
            assert response.status == 200, text
        (prefill,) = await running.legs(running.prefills)
        (second,) = await running.legs(running.decodes)
        assert prefill["stream"] is False
        assert prefill["completion_tokens"] == 1
        assert prefill["kv_transfer_params"]["do_remote_decode"] is True
        assert second["kv_transfer_params"]["do_remote_prefill"] is True
        assert second["kv_transfer_params"]["remote_port"] == running.prefills[0].side_channel_port
        assert second["completion_tokens"] == 7
        assert (await running.stats_of(running.prefills[0]))["held_blocks_requests"] == 0
        await running.at_rest()


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ({"status": 500}, (502, "prefill_failed")),
        ({"status": 400}, (400, "prefill_refused")),
        ({"die_before_headers": True}, (502, "prefill_failed")),
    ],
)
async def test_a_failed_nixl_prefill_is_answered_at_once(
    tmp_path: Path, fault: dict[str, Any], expected: tuple[int, str]
) -> None:
    async with vllm(tmp_path) as running:
        await running.fault(running.prefills[0], **fault)
        async with running.chat() as response:
            code = response.headers["x-router-error-code"]
            assert (response.status, code) == expected
        assert await running.legs(running.decodes) == []
        await running.at_rest()


async def test_a_nixl_prefill_may_take_longer_than_a_decision(tmp_path: Path) -> None:
    settings = {
        "server": {"step_deadline_secs": 0.5},
        # The service asks Envoy for more than the 0.2 s after which it would be taken for hung.
        "envoy": {"message_timeout_secs": 1, "hang_timeout_secs": 0.2},
        "pd": {"prefill_timeout_secs": 4},
    }
    async with vllm(tmp_path, settings=settings) as running:
        await running.fault(running.prefills[0], hang=2.5)
        async with running.chat() as response:
            assert response.status == 200, await response.text()
        await running.fault(running.prefills[0], hang=True)
        async with running.chat() as response:
            assert await running.error(response) == (502, "prefill_failed")
        await running.at_rest()


@pytest.mark.parametrize("decode", ["two_pass", "inline"])
async def test_of_a_pair_the_overlap_is_that_of_the_prefill_worker(
    tmp_path: Path, decode: str
) -> None:
    folder = model_of(tmp_path)
    worker = {"tokenizer_path": folder, "page_size": PAGE, "kv_events_port": 0}
    settings = {"pd": {"decode": decode}, "observability": {"debug_headers": True}}
    model = {"policy": "min_ttft", "tokenizer_path": folder}
    async with pd_stack(tmp_path, worker=worker, model=model, settings=settings) as running:
        messages = [{"role": "user", "content": LONG}]
        headers = {"x-extproc-debug": "true"}
        for _ in range(2):
            async with running.chat(messages=messages, tokens=2, headers=headers) as response:
                assert response.status == 200, await response.text()
                shown = response.headers
            await running.at_rest()
            await running.kv_settled(PAGE)
        prefill = (await running.legs(running.prefills))[-1]
        assert shown["x-extproc-worker"] == running.prefills[0].url
        assert prefill["cached_tokens"] > 600
        expected = f"{prefill['cached_tokens']}/{prefill['prompt_tokens']}"
        assert shown["x-extproc-overlap"] == expected


async def test_a_short_rest_of_a_prompt_needs_no_prefill_worker(tmp_path: Path) -> None:
    folder = model_of(tmp_path)
    worker = {
        "tokenizer_path": folder,
        "page_size": PAGE,
        "kv_events_port": 0,
        "no_server_info": False,
    }
    model = {
        "policy": "min_ttft",
        "tokenizer_path": folder,
        "pd": {"protocol": "nixl", "min_prefill_tokens": 200},
    }
    async with vllm(tmp_path, worker=worker, model=model) as running:

        async def ask(text: str) -> None:
            messages = [{"role": "user", "content": text}]
            async with running.chat(messages=messages, tokens=2) as response:
                assert response.status == 200, await response.text()

        await ask(LONG)
        assert len(await running.legs(running.prefills)) == 1
        await running.kv_settled(PAGE)
        await ask(f"{LONG} and more")
        assert len(await running.legs(running.prefills)) == 1
        assert len(await running.legs(running.decodes)) == 2
        assert await running.sample("extproc_pd_decode_alone_total") == 1
        await ask(f"{LONG} {LONG[::-1]}")
        assert len(await running.legs(running.prefills)) == 2
        await running.at_rest()
