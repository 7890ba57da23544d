"""Clients cannot steer an engine: what arrives at real sockets behind the real Envoy."""

import json
from pathlib import Path
from typing import Any

import pytest

from extproc.steering import STEERING_HEADER_PREFIXES, STEERING_MEMBERS
from extproc.testing.stack import wait_until
from tests.e2e.conftest import Launch
from tests.e2e.pd_fleet import pd_stack
from tests.e2e.test_pd_modes import vllm

LOGGING = {"log_requests": True}
HEADERS = {
    spelled: "1"
    for name in ("x-data-parallel-rank", *(f"{prefix}any" for prefix in STEERING_HEADER_PREFIXES))
    for spelled in (name, name.replace("-", "_"), name.replace("-", "_", 1), name.title())
}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/v1/completions": {"prompt": "hi", "max_tokens": 2},
    "/generate": {"text": "hi", "sampling_params": {"max_new_tokens": 2}},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/v1/responses": {"input": "hi", "max_output_tokens": 2},
}


def steered(body: dict[str, Any]) -> bytes:
    """The body with every member of the table, twice, the second time spelled with an escape."""
    plain = json.dumps({"model": "m", **body, **dict.fromkeys(STEERING_MEMBERS, 1)}).encode()
    escaped = [b'"\\u%04x%s":2' % (ord(name[0]), name[1:].encode()) for name in STEERING_MEMBERS]
    return plain[:-1] + b"," + b",".join(escaped) + b"}"


def assert_not_steered(request: dict[str, Any], ours: set[str]) -> None:
    """No header of the table arrived, and of its members only `ours`, each once."""
    names = [name.lower().replace("_", "-") for name in request["headers"]]
    assert not [name for name in names if name.startswith(STEERING_HEADER_PREFIXES)]
    arrived = [name for name in request["members"] if name in STEERING_MEMBERS]
    assert sorted(arrived) == sorted(ours)
    assert "model" in request["members"]


async def test_a_plain_worker_is_not_steered_by_a_client(launch: Launch) -> None:
    running = await launch(1, worker=LOGGING)
    for path, body in BODIES.items():
        url = f"{running.url}{path}"
        async with running.http.post(url, data=steered(body), headers=HEADERS) as response:
            assert response.status == 200, await response.text()
    requests = await running.fleet.requests()
    assert [request["path"] for request in requests] == list(BODIES)
    for request in requests:
        assert_not_steered(request, set())
        assert request["rank"] == 0
        assert int(request["headers"]["content-length"]) == request["body_bytes"]


async def test_a_worker_gets_no_such_header_while_the_service_is_gone(launch: Launch) -> None:
    running = await launch(1)
    await running.stack.service.stop()

    async def served() -> bool:
        async with running.chat(headers=HEADERS) as response:
            return bool(response.status == 200)

    await wait_until(served, "Envoy bypasses the service")
    async with running.http.get(f"{running.url}/v1/models", headers=HEADERS) as response:
        assert response.status == 200
    for request in await running.fleet.requests():
        names = [name.lower().replace("_", "-") for name in request["headers"]]
        assert not [name for name in names if name.startswith(STEERING_HEADER_PREFIXES)]


@pytest.mark.parametrize("mode", ["two_pass", "inline"])
async def test_pairs_get_only_what_the_service_sends(tmp_path: Path, mode: str) -> None:
    ours = {"bootstrap_host", "bootstrap_port", "bootstrap_room"}
    async with pd_stack(tmp_path, worker=LOGGING, settings={"pd": {"decode": mode}}) as running:
        for path, body in BODIES.items():
            url = f"{running.url}{path}"
            async with running.http.post(url, data=steered(body), headers=HEADERS) as response:
                assert response.status == 200, await response.text()
        prefills = await running.legs(running.prefills)
        decodes = await running.legs(running.decodes)
        assert len(prefills) == len(decodes) == len(BODIES)
        for request in (*prefills, *decodes):
            assert_not_steered(request, ours)
            assert request["bootstrap_host"] == "127.0.0.1"
        fault = 'response-headers={"x-router-error-code":"evil"}'
        async with running.chat(fault=fault) as response:
            assert response.status == 200
            assert "x-router-error-code" not in response.headers
        await running.at_rest()


@pytest.mark.parametrize("mode", ["two_pass", "inline"])
async def test_vllm_gets_only_what_the_service_sends(tmp_path: Path, mode: str) -> None:
    bodies = {path: body for path, body in BODIES.items() if path != "/generate"}
    alone: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": ["a", "b"], "max_tokens": 2},
        "/v1/chat/completions": BODIES["/v1/chat/completions"] | {"n": 2},
        "/v1/responses": BODIES["/v1/responses"] | {"previous_response_id": "resp_1"},
    }
    settings = {"pd": {"decode": mode}}
    async with vllm(tmp_path, worker=LOGGING, settings=settings) as running:
        for path, body in (*bodies.items(), *alone.items()):
            url = f"{running.url}{path}"
            async with running.http.post(url, data=steered(body), headers=HEADERS) as response:
                assert response.status == 200, await response.text()
        prefills = await running.legs(running.prefills)
        decodes = await running.legs(running.decodes)
        assert [one["path"] for one in prefills] == list(bodies)
        assert [one["path"] for one in decodes] == [*bodies, *alone]
        for leg in (*prefills, *decodes[: len(bodies)]):
            assert_not_steered(leg, {"kv_transfer_params"})
            assert isinstance(leg["kv_transfer_params"], dict)
        for leg in decodes[len(bodies) :]:
            assert_not_steered(leg, set())
        assert [leg["completion_tokens"] for leg in prefills] == [1] * len(bodies)
        await running.at_rest()


async def test_no_control_header_of_a_worker_reaches_the_client(launch: Launch) -> None:
    names = ("x-router-error-code", "x-extproc-worker", "x-gateway-destination-endpoint")
    running = await launch(1)
    for name in names:
        for status in ("", "status=500, "):
            fault = f'{status}response-headers={{"{name}":"evil"}}'
            async with running.chat(fault=fault) as response:
                assert response.status == (500 if status else 200)
                assert name not in response.headers
    # Other headers of the worker pass.
    async with running.chat(fault='response-headers={"x-other":"kept"}') as response:
        assert response.headers["x-other"] == "kept"
