"""A gateway that sends requests elsewhere than decided costs no request, and is reported."""

from typing import Any

import aiohttp

from extproc.testing.stack import wait_until
from tests.e2e.conftest import Launch, Running


def behind_other_addresses(bootstrap: dict[str, Any]) -> None:
    """The gateway reaches the workers at 127.0.0.2, as behind a translated address."""
    (cluster,) = [
        one for one in bootstrap["static_resources"]["clusters"] if one["name"] == "workers"
    ]
    for endpoint in cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]:
        endpoint["endpoint"]["address"]["socket_address"]["address"] = "127.0.0.2"


async def workers_page(running: Running) -> dict[str, Any]:
    url = f"{running.stack.admin_url}/workers"
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        page: dict[str, Any] = await answer.json()
    return page


async def test_a_gateway_with_other_addresses_costs_no_request_and_is_reported(
    launch: Launch,
) -> None:
    running = await launch(
        3,
        worker={"host": "0.0.0.0"},
        edit_bootstrap=behind_other_addresses,
    )

    async def reported() -> bool:
        for _ in range(3):
            async with running.chat(tokens=1) as response:
                assert response.status == 200, await response.text()
        page = await workers_page(running)
        assert {worker["breaker"] for worker in page["workers"]} == {"closed"}
        return bool(page["ignored_by_gateway"] == ["m"])

    # Workers that have just become known may be new to the gateway.
    await wait_until(reported, "the gateway is reported")
    page = await workers_page(running)
    assert not all(worker["known_to_gateway"] for worker in page["workers"])
    assert await running.sample('extproc_gateway_ignores_destinations{model="m"}') == 1
    missed = 'extproc_destination_missed_total{model="m",reason='
    assert await running.sample(f'{missed}"lag"') > 0
    assert await running.sample(f'{missed}"unknown_address"') >= 5
    log = running.stack.service.log.read_text()
    assert log.count("gateway_does_not_follow") == 1
