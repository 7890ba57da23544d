"""The service takes over a changed configuration while Envoy sends it requests."""

import asyncio
import os
import signal
import socket
import ssl
from pathlib import Path
from typing import Any

import trustme

from extproc.simulator.http import start
from extproc.simulator.settings import SimulatorSettings
from extproc.testing.stack import wait_until
from tests.e2e.conftest import Launch, Running
from tests.e2e.pd_fleet import pd_stack
from tests.unit.simulator.model_folders import model_folder


def urls_of(running: Running) -> list[str]:
    urls: list[str] = running.stack.config["discovery"]["static_urls"]["urls"]
    return urls


async def read_stream(running: Running, tokens: int, model: str = "m") -> bool:
    """True if the stream is whole."""
    async with running.chat(model, stream=True, tokens=tokens, fault="slow-token=0.02") as response:
        assert response.status == 200, await response.text()
        events = (await response.read()).split(b"\n\n")
        return events[-2] == b"data: [DONE]" and len(events) == tokens + 4


async def streams_are_open(running: Running, count: int) -> None:
    async def check() -> bool:
        return int(sum(stats["running"] for stats in await running.fleet.stats())) == count

    await wait_until(check, f"{count} streams are open")


async def shown(running: Running, url: str) -> dict[str, Any]:
    """The worker in /workers, empty if it is not there."""
    return next((one for one in await running.stack.workers() if one["url"] == url), {})


async def is_ready(running: Running, url: str) -> bool:
    return bool((await shown(running, url)).get("ready"))


async def test_fifty_reloads_cut_no_stream_and_the_last_one_counts(
    launch: Launch, tmp_path: Path
) -> None:
    endpoints = {"envoy": {"endpoints_file": str(tmp_path / "endpoints.json")}}
    running = await launch(2, settings=endpoints)
    stack, (first, second) = running.stack, urls_of(running)
    streams = [asyncio.create_task(read_stream(running, 150)) for _ in range(12)]
    await streams_are_open(running, 12)

    async def keep_asking() -> int:
        """Requests one after the other, until the streams have ended."""
        answered = 0
        while not all(one.done() for one in streams):
            async with running.chat(tokens=1) as response:
                assert response.status == 200, await response.text()
                answered += 1
        return answered

    asking = asyncio.create_task(keep_asking())
    for turn in range(50):
        stack.config["discovery"]["static_urls"]["urls"] = [first] if turn % 2 else [second, first]
        stack.config["models"][0]["policy"] = ("random", "least_load", "round_robin")[turn % 3]
        stack.config["proxy"] = {"request_timeout_secs": 100 + turn}
        stack.write_config()
        stack.service.send(signal.SIGHUP)
        await asyncio.sleep(0.01)
    assert all(await asyncio.gather(*streams))
    assert await asking > 0

    async def last_one_counts() -> bool:
        return [one["url"] for one in await stack.workers()] == [first]

    await wait_until(last_one_counts, "the last configuration is in use")
    status = await stack.config_status()
    assert (status["problems"], status["refused"]) == ([], 0)
    await stack.idle()

    # The worker that was removed is added again, and gets requests.
    stack.config["discovery"]["static_urls"]["urls"] = [first, second]
    stack.config["models"][0]["policy"] = "round_robin"
    assert (await stack.reload())["problems"] == []
    await wait_until(lambda: is_ready(running, second), "the worker is back")
    before = len((await running.fleet.stats())[1]["requests"])
    for _ in range(4):
        async with running.chat(tokens=1) as response:
            assert response.status == 200
    assert len((await running.fleet.stats())[1]["requests"]) == before + 2


async def test_what_cannot_be_used_leaves_everything_as_it_is(launch: Launch) -> None:
    running = await launch(1)
    stack = running.stack
    good = stack.config_file.read_text()
    model = "models: [{id: m}, {id: "

    async def refuses(problem: str) -> None:
        before = (await stack.config_status())["refused"]
        stack.service.send(signal.SIGHUP)

        async def refused() -> bool:
            return bool((await stack.config_status())["refused"] > before)

        await wait_until(refused, "the file is refused")
        problems = (await stack.config_status())["problems"]
        assert any(problem in one for one in problems), problems
        assert await running.sample("extproc_config_current") == 0
        assert await stack.answers(f"{stack.admin_url}/readyz")
        async with running.chat() as response:
            assert response.status == 200

    stack.config_file.write_text(good.replace("models:", "modells:"))
    await refuses("modells: unknown key")
    stack.config_file.write_text(good[: good.index("models:")] + model)
    await refuses("not valid YAML")
    stack.config_file.unlink()
    await refuses("cannot be read")
    # Two keys need a restart, and the third one, which does not, is not applied either.
    port = stack.config["server"]["port"]
    stack.config_file.write_text(
        good.replace(f"port: {port}", f"port: {port + 1}").replace("id: m", "id: other")
        + "kv: {replay_retry_secs: 7}\n"
    )
    await refuses("server.port: a change of this needs a restart")
    assert "kv.replay_retry_secs: " in (await stack.config_status())["problems"][1]
    log = stack.service.log.read_text()
    assert "config_refused" in log
    assert "modells: unknown key" in log
    # The good file again, by itself.
    stack.config_file.write_text(good)

    async def mended() -> bool:
        return not (await stack.config_status())["problems"]

    await wait_until(mended, "the good file is noticed")
    assert await running.sample("extproc_config_current") == 1


async def test_a_config_map_is_noticed_when_its_link_moves(launch: Launch) -> None:
    """Kubernetes replaces the link `..data`; neither the file nor the link to it changes."""
    running = await launch(1, settings={"models": [{"id": "m"}]})
    stack, folder = running.stack, running.stack.folder
    text = stack.config_file.read_text()
    mounted = folder / "mounted"
    for name, version in (("..1", text), ("..2", text.replace("id: m", "id: n"))):
        (mounted / name).mkdir(parents=True)
        (mounted / name / "extproc.yaml").write_text(version)
    (mounted / "..data").symlink_to("..1")
    (mounted / "extproc.yaml").symlink_to("..data/extproc.yaml")
    stack.config_file.unlink()
    stack.config_file.symlink_to(mounted / "extproc.yaml")
    (mounted / "..data_tmp").symlink_to("..2")
    os.replace(mounted / "..data_tmp", mounted / "..data")

    async def renamed() -> bool:
        async with running.http.get(f"{running.url}/v1/models") as response:
            return [one["id"] for one in (await response.json())["data"]] == ["n"]

    await wait_until(renamed, "the other model is served")
    async with running.chat("m") as response:
        assert response.status == 404


async def test_a_removed_model_ends_with_its_last_request(launch: Launch, tmp_path: Path) -> None:
    folder = str(model_folder(tmp_path))
    models = [
        {"id": "gone", "policy": "min_ttft", "tokenizer_path": folder},
        {"id": "stays"},
    ]
    running = await launch(
        1,
        models=("gone", "stays"),
        worker={"kv_events_port": 0},
        settings={"models": models},
    )
    stack = running.stack
    streaming = asyncio.create_task(read_stream(running, 150, "gone"))
    await streams_are_open(running, 1)
    assert (await shown(running, urls_of(running)[0]))["kv"]
    stack.config["models"] = models[1:]
    assert (await stack.reload())["problems"] == []
    async with running.chat("gone") as response:
        assert await running.error(response) == (404, "model_not_found")
    assert await streaming

    async def forgotten() -> bool:
        metrics = await stack.metrics()
        return metrics["extproc_kv_ranks"] == 0 and not any(
            'model="gone"' in name for name in metrics if not name.startswith("extproc_workers{")
        )

    await wait_until(forgotten, "nothing is known of the model")
    assert (await shown(running, urls_of(running)[0]))["in_flight"] == 0
    # And back: the worker's events are followed again.
    stack.config["models"] = models
    assert (await stack.reload())["problems"] == []
    async with running.chat("gone") as response:
        assert response.status == 200

    async def followed() -> bool:
        worker = await shown(running, urls_of(running)[0])
        return bool(worker["kv"]) and bool(worker["kv"]["ranks"][0]["trusted"])

    await wait_until(followed, "the worker's events are followed")


async def test_a_worker_that_envoy_does_not_know_is_not_picked(
    launch: Launch, tmp_path: Path
) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    file = folder / "endpoints.json"
    running = await launch(1, settings={"envoy": {"endpoints_file": str(file)}})
    stack = running.stack
    # From now on the file cannot be replaced.
    file.unlink()
    (file / "in the way").mkdir(parents=True)
    new = await start(SimulatorSettings(model="m", decode_milliseconds_per_token=2.0))
    # The file has addresses, so the service resolves the name.
    url = f"http://localhost:{new.port}"
    try:
        stack.config["discovery"]["static_urls"]["urls"].append(url)
        assert (await stack.reload())["problems"] == []

        async def joined() -> bool:
            return (await shown(running, url)).get("model") == "m"

        await wait_until(joined, "the worker has answered")
        worker = await shown(running, url)
        assert (worker["known_to_gateway"], worker["ready"]) == (False, False)
        assert await running.sample("extproc_workers_unknown_to_gateway") == 1
        for _ in range(4):
            async with running.chat(tokens=1) as response:
                assert response.status == 200
        assert len(await running.fleet.requests()) == 4
        (file / "in the way").rmdir()
        file.rmdir()
        await wait_until(lambda: is_ready(running, url), "Envoy has the file")
        running.fleet.workers.append(new)
        for _ in range(4):
            async with running.chat(tokens=1) as response:
                assert response.status == 200
        assert [len(stats["requests"]) for stats in await running.fleet.stats()] == [6, 2]
        assert await running.sample("extproc_destination_missed_total") == 0
        assert not (await stack.config_status())["envoy_config_outdated"]
    finally:
        await new.stop()


async def test_a_certificate_is_replaced_under_traffic(launch: Launch, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")

    def issue() -> None:
        certificate = authority.issue_cert("127.0.0.1")
        certificate.private_key_pem.write_to_path(tmp_path / "tls.key")
        certificate.cert_chain_pems[0].write_to_path(tmp_path / "tls.pem")

    issue()
    tls = {"cert_file": str(tmp_path / "tls.pem"), "key_file": str(tmp_path / "tls.key")}
    running = await launch(
        1,
        settings={
            "server": {"tls": tls},
            "envoy": {"extproc": {"ca_file": str(tmp_path / "ca.pem")}},
        },
    )
    stack = running.stack
    port = stack.config["server"]["port"]
    trusted = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    trusted.set_alpn_protocols(["h2"])

    def read_serial() -> str:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
            trusted.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
        ):
            found = secure.getpeercert()
            assert found is not None
            return str(found["serialNumber"])

    async def serial() -> str:
        return await asyncio.to_thread(read_serial)

    before = await serial()
    streaming = asyncio.create_task(read_stream(running, 150))
    await streams_are_open(running, 1)
    (tmp_path / "tls.pem").write_text("half of a cert")
    assert "server.tls.cert_file: " in (await stack.reload())["problems"][0]
    assert await serial() == before
    # A new pair; it is noticed without a signal.
    issue()

    async def replaced() -> bool:
        return await serial() != before

    await wait_until(replaced, "the new certificate is shown")
    async with running.chat() as response:
        assert response.status == 200
    assert await streaming


async def test_a_second_sigterm_ends_the_drain_at_once(launch: Launch) -> None:
    running = await launch(1, settings={"server": {"drain_secs": 600}})
    service = running.stack.service
    waiting = asyncio.create_task(read_stream(running, 3))
    await waiting
    service.send(signal.SIGTERM)

    async def draining() -> bool:
        return "draining" in service.log.read_text()

    await wait_until(draining, "the drain has begun")
    assert await service.stop(signal.SIGTERM) == -signal.SIGTERM


async def test_pairs_whose_prefill_runs_survive_a_reload(tmp_path: Path) -> None:
    """The second pass of a request may come under another configuration than its first one."""
    slow = {"prefill_tokens_per_second": 20.0}
    async with pd_stack(tmp_path, prefills=2, worker=slow) as running:
        stack = running.stack
        streams = [asyncio.create_task(read_stream(running, 20)) for _ in range(4)]

        async def arrived() -> bool:
            return len(await running.legs(running.prefills)) == 4

        await wait_until(arrived, "the prefills have begun")
        gone = running.prefills[0].url
        for decode in ("inline", "two_pass"):
            stack.config["pd"] = {"decode": decode, "prefill_timeout_secs": 80}
            stack.config["models"][0]["policy"] = "random"
            assert (await stack.reload())["problems"] == []
        stack.config["discovery"]["static_urls"]["urls"].remove(gone)
        assert (await stack.reload())["problems"] == []
        assert all(await asyncio.gather(*streams))
        await running.at_rest()
        assert [url for url in await running.roles() if url == gone] == []
        assert await running.sample("extproc_pd_pairs_total") == 4
        assert await running.sample('extproc_pd_pairs_total{model="m",outcome="ok"}') == 4
