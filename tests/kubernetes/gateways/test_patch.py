"""What the optional patch of the recipe for Envoy Gateway adds, and what is lost without it."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from extproc.config.loading import parse_config
from extproc.envoy_config import render_bootstrap
from extproc.simulator.faults import FAULT_HEADER
from extproc.testing.stack import wait_until

from .fleet import Fleet, chat_of
from .installation import RECIPE, Installation, wait_for

DISCOVERY = {"backend": "static_urls", "static_urls": {"urls": ["http://10.0.0.1:8000"]}}
PATCH = str(RECIPE / "patch.yaml")


@pytest.fixture
def patched(installed: Installation) -> Iterator[None]:
    installed.api.kubectl("create", "--validate=strict", "-f", PATCH)
    wait_for(lambda: is_patched(installed), "Envoy has the patch")
    yield
    installed.api.kubectl("delete", "-f", PATCH)
    wait_for(lambda: not is_patched(installed), "Envoy has lost the patch")


def is_patched(installed: Installation) -> bool:
    return '"response_trailer_mode": "SEND"' in installed.dump("listeners")


async def streams(fleet: Fleet) -> float:
    """Streams of Envoy to the replicas that have ended."""
    metrics = await fleet.metrics()
    return sum(value for name, value in metrics.items() if "extproc_streams_total" in name)


def rejected(fleet: Fleet) -> int:
    """Headers that the service wanted to set, and Envoy did not allow."""
    return sum(fleet.installed.stats("rejected_header_mutations").values())


async def one_more_ended(fleet: Fleet, before: float) -> None:
    async def ended() -> bool:
        return await streams(fleet) == before + 1

    await wait_until(ended, "the stream to the service has ended")


async def test_without_it_the_stream_to_the_service_ends_at_the_response_headers(
    fleet: Fleet,
) -> None:
    await fleet.run(1)
    before = await streams(fleet)
    async with fleet.post(chat_of("hello", stream=True, max_tokens=200)) as answer:
        assert answer.status == 200
        await one_more_ended(fleet, before)
        assert not answer.content.at_eof()
        await answer.read()


async def test_without_it_an_answer_that_comes_after_the_stream_reaches_the_client(
    fleet: Fleet,
) -> None:
    """Envoy Gateway ends a stream to the service after ten seconds."""
    await fleet.run(1)
    before = await streams(fleet)
    headers = {FAULT_HEADER: "hang=11"}
    async with fleet.post(chat_of("hello"), headers=headers) as answer:
        assert answer.status == 200
        await one_more_ended(fleet, before)


async def test_without_it_envoy_drops_the_time_out_of_a_request(fleet: Fleet) -> None:
    await fleet.run(1)
    before = rejected(fleet)
    await fleet.chat("hello")
    assert rejected(fleet) > before


async def test_with_it_the_stream_lasts_as_long_as_the_response(
    fleet: Fleet, patched: None
) -> None:
    await fleet.run(1)
    before = await streams(fleet)
    async with fleet.post(chat_of("hello", stream=True, max_tokens=200)) as answer:
        assert answer.status == 200
        await answer.content.readany()
        assert await streams(fleet) == before
        await answer.read()
        await one_more_ended(fleet, before)


async def test_with_it_envoy_takes_every_header_of_the_service(fleet: Fleet, patched: None) -> None:
    await fleet.run(1)
    before = rejected(fleet)
    await fleet.chat("hello")
    assert rejected(fleet) == before
    found = fleet.installed.api.kubectl("get", "envoypatchpolicy/llm-extproc", "-ojson")
    (ancestor,) = json.loads(found)["status"]["ancestors"]
    conditions = {one["type"]: one["status"] for one in ancestor["conditions"]}
    assert conditions == {"Accepted": "True", "Programmed": "True"}


def plain(one: Any) -> Any:
    """The same in one spelling: a dump of Envoy has no defaults, and other forms of numbers."""
    if isinstance(one, dict):
        return {key: plain(value) for key, value in one.items() if value != "NONE"}
    if isinstance(one, list):
        return [plain(value) for value in one]
    text = str(one)
    if re.fullmatch(r"[\d.]+s", text):
        return float(text[:-1])
    return sorted(text.split(",")) if "," in text else text


async def test_with_it_the_filter_is_the_one_that_is_rendered(fleet: Fleet, patched: None) -> None:
    await fleet.run(1)
    listeners = json.loads(fleet.installed.dump("listeners"))["configs"]
    (listener,) = (one for one in listeners if one["name"] == "default/llm/http")
    chain = listener["active_state"]["listener"]["default_filter_chain"]
    found = chain["filters"][0]["typed_config"]["http_filters"][0]["typed_config"]
    raw = {"models": [{"id": "m"}], "discovery": DISCOVERY}
    rendered = render_bootstrap(parse_config(raw))["static_resources"]["listeners"][0]
    manager = rendered["filter_chains"][0]["filters"][0]["typed_config"]
    (ours,) = (one for one in manager["http_filters"] if "ext_proc" in one["name"])
    wanted = ours["typed_config"]
    same = wanted.keys() - {"@type", "grpc_service", "status_on_error"}
    assert plain({key: found[key] for key in same}) == plain({key: wanted[key] for key in same})
    retry = (one["grpc_service"]["retry_policy"] for one in (found, wanted))
    assert plain(next(retry)) == plain(next(retry))
