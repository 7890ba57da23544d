"""The route of the recipe for Envoy Gateway that refuses requests without a decision."""

from collections.abc import Iterator

import pytest

from .fleet import Fleet, chat_of
from .installation import RECIPE, Installation, wait_for


@pytest.fixture
def closed(installed: Installation) -> Iterator[None]:
    """The route that fails closed in place of the other one."""
    file = str(RECIPE / "route-fail-closed.yaml")
    installed.api.kubectl("apply", "--server-side", "--force-conflicts", "-f", file)
    wait_for(lambda: is_closed(installed), "Envoy has the route that fails closed")
    yield
    installed.api.kubectl("delete", "-f", file)
    installed.api.kubectl("apply", "-f", str(RECIPE / "route.yaml"))
    wait_for(lambda: not is_closed(installed), "Envoy has the route that fails open")


def is_closed(installed: Installation) -> bool:
    return "router_unavailable" in installed.dump("route_configs")


async def test_a_request_without_a_decision_gets_503(fleet: Fleet, closed: None) -> None:
    await fleet.run(2)
    await fleet.chat("hello")
    async with fleet.post(chat_of("hello", metadata={"filling": "x" * 5_000_000})) as answer:
        assert answer.status == 200
    for service in fleet.installed.services:
        service.kill()
    for service in fleet.installed.services:
        await fleet.service_is_known(service, False)
    before = await fleet.served()
    for _ in range(5):
        async with fleet.post(chat_of("hello"), headers={"x-extproc-model": "m"}) as answer:
            assert answer.status == 503
            assert answer.headers["x-router-error-code"] == "router_unavailable"
            assert answer.headers["retry-after"] == "1"
            assert (await answer.json())["error"]["code"] == "router_unavailable"
    assert await fleet.served() == before
    for service in fleet.installed.services:
        service.start()
    for service in fleet.installed.services:
        await fleet.service_is_known(service, True)
    await fleet.chat("hello")


async def test_errors_of_the_service_are_not_replaced(fleet: Fleet, closed: None) -> None:
    await fleet.run(1)
    async with fleet.post(chat_of("hello", model="another")) as answer:
        assert answer.status == 404
        assert (await answer.json())["error"]["code"] == "model_not_found"
