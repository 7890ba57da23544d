"""Processing modes and transports of other gateways, on the real Envoy."""

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trustme
from aiohttp import web

from extproc.simulator.http import create_app
from extproc.simulator.settings import SimulatorSettings
from extproc.steering import STEERING_MEMBERS
from extproc.testing.stack import wait_until
from tests.e2e.conftest import Launch, Running


def ext_proc_filter(bootstrap: dict[str, Any]) -> dict[str, Any]:
    """The configuration of our filter in a rendered bootstrap."""
    manager = bootstrap["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]
    (found,) = [
        one["typed_config"]
        for one in manager["typed_config"]["http_filters"]
        if one["name"] == "envoy.filters.http.ext_proc"
    ]
    config: dict[str, Any] = found
    return config


def with_modes(**modes: Any) -> Callable[[dict[str, Any]], None]:
    def edit(bootstrap: dict[str, Any]) -> None:
        config = ext_proc_filter(bootstrap)
        if modes.pop("not_waiting", False):
            config["send_body_without_waiting_for_header_response"] = True
        config["processing_mode"].update(modes)
        if modes.get("response_body_mode") == "FULL_DUPLEX_STREAMED" or (
            modes.get("request_body_mode") == "FULL_DUPLEX_STREAMED"
        ):
            config["processing_mode"]["request_trailer_mode"] = "SEND"

    return edit


async def no_load(running: Running) -> bool:
    return await running.stack.in_flight() == 0


MODES: dict[str, dict[str, Any]] = {
    "partial": {"request_body_mode": "BUFFERED_PARTIAL"},
    "streamed": {"request_body_mode": "STREAMED", "not_waiting": True},
    "streamed-waiting": {"request_body_mode": "STREAMED"},
    "none": {"request_body_mode": "NONE"},
    "duplex": {"request_body_mode": "FULL_DUPLEX_STREAMED"},
    "duplex-both": {
        "request_body_mode": "FULL_DUPLEX_STREAMED",
        "response_body_mode": "FULL_DUPLEX_STREAMED",
    },
    "response-streamed": {"response_body_mode": "STREAMED"},
    "headers-only-response": {"response_trailer_mode": "SKIP"},
}


@pytest.mark.parametrize("mode", MODES)
async def test_routing_works_in_every_body_mode(launch: Launch, mode: str) -> None:
    running = await launch(
        2,
        worker={"prefill_tokens_per_second": 1e9, "log_requests": True},
        edit_bootstrap=with_modes(**MODES[mode]),
    )
    pad = "x" * 300_000
    for index in range(6):
        fields: dict[str, Any] = (
            {"messages": [{"role": "user", "content": pad}]} if index % 2 else {}
        )
        if index < 2:
            fields |= dict.fromkeys(STEERING_MEMBERS, 0)
        async with running.chat(stream=index < 3, tokens=20, **fields) as response:
            assert response.status == 200, await response.text()
            body = await response.read()
            if index < 3:
                # Nothing is lost at the beginning or at the end.
                assert body.count(b"data: ") == 23
                assert b'"role":"assistant"' in body.replace(b" ", b"")
    assert await running.sample("extproc_destination_missed_total") == 0
    assert [stats["completed"] for stats in await running.fleet.stats()] == [3, 3]
    sizes = [request["body_bytes"] for request in await running.fleet.requests()]
    assert sum(size > 300_000 for size in sizes) == 3
    if mode != "none":  # where the gateway shows no body
        names = {name for one in await running.fleet.requests() for name in one["members"]}
        assert names.isdisjoint(STEERING_MEMBERS)
    await wait_until(lambda: no_load(running), "load released")


@pytest.mark.parametrize("mode", ["duplex", "streamed", "partial"])
async def test_errors_are_answered_in_every_body_mode(launch: Launch, mode: str) -> None:
    running = await launch(1, edit_bootstrap=with_modes(**MODES[mode]))
    async with running.chat("unknown") as response:
        assert await running.error(response) == (404, "model_not_found")
    async with running.http.post(
        f"{running.url}/v1/chat/completions", data=b"not json"
    ) as response:
        assert await running.error(response) == (400, "bad_request")


async def test_requests_for_two_models_are_refused_without_a_visible_body(launch: Launch) -> None:
    running = await launch(
        1, models=("a", "b"), edit_bootstrap=with_modes(request_body_mode="NONE")
    )
    async with running.chat("a") as response:
        assert await running.error(response) == (503, "body_mode_unsupported")


async def test_load_is_released_by_estimate_when_the_gateway_closes_at_the_headers(
    launch: Launch,
) -> None:
    running = await launch(
        1,
        settings={"load": {"release": "estimate", "estimated_stream_secs": 1}},
        edit_bootstrap=with_modes(response_trailer_mode="SKIP"),
    )
    async with running.chat(stream=True, tokens=3) as response:
        await response.read()
        assert await running.stack.in_flight() == 1
    await wait_until(lambda: no_load(running), "load released after the estimate")


async def test_over_a_unix_socket(launch: Launch, tmp_path: Path) -> None:
    running = await launch(1, settings={"server": {"unix_socket": str(tmp_path / "x.sock")}})
    async with running.chat() as response:
        assert response.status == 200
    assert await running.sample("extproc_requests_total") == 1


@pytest.mark.parametrize("endpoints_file", [False, True])
async def test_an_https_worker_is_verified(
    launch: Launch, tmp_path: Path, endpoints_file: bool
) -> None:
    envoy = {"endpoints_file": str(tmp_path / "endpoints.json")} if endpoints_file else {}
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    server_tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(server_tls)
    runner = web.AppRunner(create_app(SimulatorSettings(model="m")), handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=server_tls).start()
        port = runner.addresses[0][1]
        # A plain worker beside it: both kinds in one cluster.
        running = await launch(
            1,
            settings={"workers": {"ca_file": str(tmp_path / "ca.pem")}, "envoy": envoy},
            urls=lambda urls: [*urls, f"https://localhost:{port}"],
        )
        workers = set()

        async def both() -> bool:
            async with running.chat() as response:
                assert response.status == 200
                workers.add(response.headers["x-simulator-port"])
            return workers == {str(port), str(running.fleet.workers[0].port)}

        # Envoy may learn the second one a moment later.
        await wait_until(both, "both workers serve")
        assert await running.sample("extproc_destination_missed_total") == 0
    finally:
        await runner.cleanup()


async def test_over_mutual_tls(launch: Launch, tmp_path: Path) -> None:
    authority = trustme.CA()
    for name in ("server", "client"):
        certificate = authority.issue_cert("127.0.0.1", "localhost")
        certificate.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        certificate.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    running = await launch(
        1,
        settings={
            "server": {
                "tls": {
                    "cert_file": str(tmp_path / "server.pem"),
                    "key_file": str(tmp_path / "server.key"),
                    "client_ca_file": str(tmp_path / "ca.pem"),
                }
            },
            "envoy": {
                "extproc": {
                    "ca_file": str(tmp_path / "ca.pem"),
                    "cert_file": str(tmp_path / "client.pem"),
                    "key_file": str(tmp_path / "client.key"),
                }
            },
        },
    )
    async with running.chat() as response:
        assert response.status == 200
    assert await running.sample("extproc_requests_total") == 1
