"""The recipe for Envoy Gateway with the real controller, the real Envoy and real traffic."""

import asyncio
import json

import aiohttp
import pytest
import yaml

from extproc.headers import DESTINATION_HEADER
from extproc.simulator.faults import FAULT_HEADER
from extproc.testing.stack import wait_until

from ..pods import end_pod
from .fleet import PAGE, Fleet, chat_of
from .installation import RECIPE, URL, wait_for

# A token is a byte, but for the four marks of the template.
LONG = "The tide comes in and the tide goes out. " * 20


async def warm(fleet: Fleet, *numbers: int) -> dict[int, str]:
    """Give each of the workers a text of its own directly, and wait until the service knows."""
    texts = {n: f"{n} {LONG}" for n in numbers}
    for n, text in texts.items():
        await fleet.chat(text, n)

    async def known() -> bool:
        for service in fleet.installed.services:
            pages = [one["kv"]["ranks"][0]["pages"] for one in await fleet.listed(service)]
            if min(pages) < len(LONG) // PAGE:
                return False
        return True

    await wait_until(known, "the pages are known")
    return texts


async def test_the_controller_accepts_every_object_of_the_recipe(fleet: Fleet) -> None:
    await fleet.run(1)
    for name in (
        "httproute/llm",
        "envoyextensionpolicy/llm-extproc",
        "clienttrafficpolicy/llm",
        "backendtrafficpolicy/llm",
    ):
        status = json.loads(fleet.installed.api.kubectl("get", name, "-ojson"))["status"]
        (parent,) = status.get("parents", status.get("ancestors"))
        conditions = {one["type"]: one["status"] for one in parent["conditions"]}
        assert conditions["Accepted"] == "True"
        assert set(conditions.values()) == {"True"}, parent


async def test_requests_go_to_the_worker_that_has_their_pages(fleet: Fleet) -> None:
    texts = await warm(fleet, *await fleet.run(3))
    for n, text in [*texts.items()] * 3:
        before = await fleet.served()
        usage = (await fleet.chat(text))["usage"]
        assert (await fleet.served())[n] == before[n] + 1
        assert usage["prompt_tokens_details"]["cached_tokens"] > len(LONG) - PAGE


async def test_headers_of_clients_that_route_or_steer_have_no_effect(fleet: Fleet) -> None:
    n, other = await fleet.run(2)
    text = (await warm(fleet, n, other))[n]
    policy = yaml.safe_load_all((RECIPE / "policies.yaml").read_text())
    (spec,) = (one["spec"] for one in policy if one["kind"] == "ClientTrafficPolicy")
    names = spec["headers"]["earlyRequestHeaders"]["remove"]
    steering = {"x-data-parallel-rank": "7", "X_Override_Rid": "mine", "x-override-priority": "9"}
    headers = dict.fromkeys(names, "1") | steering
    headers[DESTINATION_HEADER] = fleet.address(other)
    for _ in range(5):
        await fleet.chat(text, headers=headers)
    # Not among the pods of the Service.
    await fleet.chat(text, headers={DESTINATION_HEADER: "127.0.0.1:8081"})
    *_, last = await fleet.requests(n)
    assert await fleet.served() == {n: 7, other: 1}
    assert not {name.lower() for name in steering} & {name.lower() for name in last["headers"]}


@pytest.mark.parametrize("name", ["x-extproc-worker", DESTINATION_HEADER, "x-router-error-code"])
async def test_a_worker_cannot_speak_to_clients_as_the_service(fleet: Fleet, name: str) -> None:
    await fleet.run(1)
    headers = {"x-extproc-debug": "true", FAULT_HEADER: f'response-headers={{"{name}": "mine"}}'}
    async with fleet.post(chat_of("hello"), headers=headers) as answer:
        assert answer.status == 200
        assert name not in answer.headers
        assert [one for one in answer.headers if one.lower().startswith("x-extproc")] == []


async def test_a_busy_answer_of_a_worker_reaches_the_client(fleet: Fleet) -> None:
    await fleet.run(2)
    headers = {FAULT_HEADER: "status=429, retry-after=7"}
    async with fleet.post(chat_of("hello"), headers=headers) as answer:
        assert (answer.status, answer.headers["retry-after"]) == (429, "7")
    assert sum((await fleet.served()).values()) == 1


async def test_a_stream_comes_chunk_by_chunk(fleet: Fleet) -> None:
    await fleet.run(1)
    async with fleet.post(chat_of("hello", stream=True, max_tokens=50)) as answer:
        assert answer.status == 200
        times = []
        text = b""
        async for chunk, _ in answer.content.iter_chunks():
            times.append(asyncio.get_running_loop().time())
            text += chunk
    assert text.rstrip().endswith(b"data: [DONE]")
    assert len(times) > 10


async def test_a_large_body_is_routed(fleet: Fleet) -> None:
    """Larger than Envoy's default buffer and than an HTTP/2 window."""
    await fleet.run(2)
    before = await decided(fleet)
    async with fleet.post(chat_of("hello", metadata={"filling": "x" * 5_000_000})) as answer:
        assert answer.status == 200, await answer.text()
    assert await decided(fleet) == before + 1


async def test_a_body_over_the_limit_is_refused(fleet: Fleet) -> None:
    await fleet.run(1)
    async with fleet.post(chat_of("hello", metadata={"filling": "x" * 36_000_000})) as answer:
        assert answer.status == 413


async def test_errors_of_the_service_reach_the_client(fleet: Fleet) -> None:
    await fleet.run(1)
    async with fleet.post(chat_of("hello", model="another")) as answer:
        assert answer.status == 404
        assert answer.headers["x-router-error-code"] == "model_not_found"
        assert (await answer.json())["error"]["code"] == "model_not_found"


async def test_a_client_of_http_1_0_is_served(fleet: Fleet) -> None:
    await fleet.run(1)
    body = json.dumps(chat_of("hello")).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", 10080)
    head = "POST /v1/chat/completions HTTP/1.0\r\nhost: llm.example.com\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    assert b" 200 OK\r\n" in answer[:20]


async def test_paths_that_are_not_in_the_route_stay_out_of_reach(fleet: Fleet) -> None:
    await fleet.run(1)
    headers = {"host": "llm.example.com"}
    async with fleet.http.post(f"{URL}/flush_cache", headers=headers) as answer:
        assert answer.status == 404


async def decided(fleet: Fleet) -> float:
    """Requests that the replicas have given a destination."""
    metrics = await fleet.metrics()
    return sum(value for name, value in metrics.items() if name.startswith("extproc_decisions"))


async def test_a_pod_that_is_deleted_gets_no_requests_and_finishes_its_streams(
    fleet: Fleet,
) -> None:
    leaving, staying = await fleet.run(2)
    text = (await warm(fleet, leaving, staying))[leaving]
    async with fleet.post(chat_of(text, stream=True, max_tokens=400)) as stream:
        assert stream.status == 200
        assert (await fleet.served())[leaving] == 2
        await end_pod(fleet.objects, leaving, grace_seconds=60)
        await drained(fleet, leaving)
        before = await fleet.served()
        for _ in range(10):
            await fleet.chat(text)
        assert await fleet.served() == {leaving: 2, staying: before[staying] + 10}
        assert (await stream.text()).rstrip().endswith("data: [DONE]")
    await fleet.leave(leaving)
    await fleet.is_followed()
    assert fleet.address(leaving) not in fleet.installed.endpoints()


async def drained(fleet: Fleet, n: int) -> None:
    """Wait until no replica gives requests to this worker any more."""
    url = f"http://{fleet.address(n)}"

    async def known() -> bool:
        lists = [await fleet.listed(service) for service in fleet.installed.services]
        return all(one["draining"] for workers in lists for one in workers if one["url"] == url)

    await wait_until(known, "the replicas know that the pod ends")


async def test_the_next_worker_of_the_list_serves_when_the_first_is_gone(fleet: Fleet) -> None:
    """The pod is still ready for the cluster, and its server has gone."""
    gone, other = await fleet.run(2)
    text = (await warm(fleet, gone, other))[gone]
    await fleet.workers[gone].stop()
    await fleet.chat(text)
    assert (await fleet.requests(other))[-1]["path"] == "/v1/chat/completions"
    assert fleet.installed.stats("upstream_rq_retry$")


class Clients:
    """Clients that ask one after the other, until the block ends; `statuses` has the answers."""

    def __init__(self, fleet: Fleet, count: int = 4) -> None:
        self.statuses: list[int | str] = []
        self._fleet = fleet
        self._count = count
        self._stop = False
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Clients":
        self._tasks = [asyncio.create_task(self._ask(n)) for n in range(self._count)]
        await self.more()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop = True
        await asyncio.gather(*self._tasks)

    async def more(self, count: int = 20) -> None:
        """Wait until that many more requests have been answered."""
        wanted = len(self.statuses) + count

        async def answered() -> bool:
            return len(self.statuses) >= wanted

        await wait_until(answered, f"{count} more answers")

    async def _ask(self, number: int) -> None:
        while not self._stop:
            try:
                async with self._fleet.post(chat_of(f"{number} hello")) as answer:
                    await answer.read()
                    self.statuses.append(answer.status)
            except aiohttp.ClientError as error:
                self.statuses.append(repr(error))


async def test_a_replica_that_dies_costs_no_request(fleet: Fleet) -> None:
    await fleet.run(2)
    first, second = fleet.installed.services
    async with Clients(fleet) as clients:
        first.kill()
        await fleet.service_is_known(first, False)
        await clients.more()
        first.start()
        await fleet.service_is_known(first, True)
        second.stop()
        await fleet.service_is_known(second, False)
        await clients.more()
        second.start()
        await fleet.service_is_known(second, True)
        await clients.more()
    assert set(clients.statuses) == {200}


async def test_a_replica_that_hangs_delays_requests_until_its_probe_fails(fleet: Fleet) -> None:
    await fleet.run(2)
    first, _ = fleet.installed.services
    async with Clients(fleet) as clients:
        with first.frozen():
            await fleet.service_is_known(first, False)
            # Requests that wait for it go on without it after the time-out of a message.
            await clients.more()
        await fleet.service_is_known(first, True)
        await clients.more()
    assert set(clients.statuses) == {200}


async def test_without_the_service_requests_go_to_the_workers_and_back(fleet: Fleet) -> None:
    numbers = await fleet.run(2)
    texts = await warm(fleet, *numbers)
    async with Clients(fleet) as clients:
        for service in fleet.installed.services:
            service.kill()
        for service in fleet.installed.services:
            await fleet.service_is_known(service, False)
        await clients.more()
        # Headers that route are removed before there is a service, too.
        for _ in range(10):
            await fleet.chat("other", headers={DESTINATION_HEADER: fleet.address(numbers[0])})
        for service in fleet.installed.services:
            service.start()
        for service in fleet.installed.services:
            await fleet.service_is_known(service, True)
        await clients.more()
    assert set(clients.statuses) == {200}
    await fleet.is_followed()
    await warm(fleet, *numbers)
    for n, text in texts.items():
        before = await fleet.served()
        await fleet.chat(text)
        assert (await fleet.served())[n] == before[n] + 1


async def test_traffic_goes_on_without_the_controller(fleet: Fleet) -> None:
    first, second = await fleet.run(2)
    async with Clients(fleet) as clients:
        fleet.installed.kill_controller()
        await clients.more()
        # Envoy does not learn of this, and the service does: it names the worker that stays.
        await end_pod(fleet.objects, first, grace_seconds=60)
        await drained(fleet, first)
        before = await fleet.served()
        await clients.more()
        assert (await fleet.served())[first] <= before[first] + 4  # those that were under way
        await fleet.leave(first)
        await clients.more()
        fleet.installed.start_controller()
        await fleet.is_followed()
        await fleet.run(1)
        await clients.more()
    assert set(clients.statuses) == {200}
    assert second in fleet.workers


async def test_an_envoy_that_restarts_gets_everything_again(fleet: Fleet) -> None:
    n, other = await fleet.run(2)
    text = (await warm(fleet, n, other))[n]
    fleet.installed.envoy.kill()
    fleet.installed.envoy.start()
    await fleet.is_followed()
    wait_for(lambda: fleet.installed.accepts_requests(), "Envoy listens")
    await fleet.chat(text)
    assert await fleet.served() == {n: 2, other: 1}


async def test_pods_are_replaced_one_by_one_without_a_failed_request(fleet: Fleet) -> None:
    old = await fleet.run(3)
    async with Clients(fleet) as clients:
        for n in old:
            await fleet.run(1)
            await end_pod(fleet.objects, n, grace_seconds=60)
            await drained(fleet, n)
            await clients.more()
            await fleet.leave(n)
            await fleet.is_followed()
    assert set(clients.statuses) == {200}
    assert not set(old) & set(fleet.workers)
