"""A gateway names the endpoints to which it can send a request, and no other one is chosen."""

from typing import Any

import pytest
from google.protobuf.json_format import ParseDict

from extproc._protos import llm_extproc_pb2 as pb
from extproc.headers import DESTINATION_SUBSET_HEADER, DESTINATION_SUBSET_NAMESPACE
from tests.protocol.exchange import (
    Service,
    destination,
    error,
    llm_body,
    request_body,
    request_headers,
    serving,
    stream,
)

FIRST, SECOND, THIRD = (f"10.0.0.{number}:8000" for number in (1, 2, 3))


def with_subset(message: pb.ProcessingRequest, value: Any) -> pb.ProcessingRequest:
    """The message with this value of the subset, or with others of its namespace if it is None."""
    member = {"other": 1} if value is None else {DESTINATION_SUBSET_HEADER: value}
    metadata = {"filter_metadata": {DESTINATION_SUBSET_NAMESPACE: member}}
    ParseDict(metadata, message.metadata_context)
    return message


async def chosen(service: Service, subset: Any, times: int, mode: str = "BUFFERED") -> list[str]:
    """Destinations of requests one after the other, or the codes of their errors."""
    found = []
    for _ in range(times):
        async with stream(service) as envoy:
            await envoy.send(with_subset(request_headers(mode=mode), subset))
            if mode == "BUFFERED":
                await envoy.reply()
            await envoy.send(request_body(llm_body()))
            reply = await envoy.reply()
            if reply.HasField("immediate_response"):
                found.append(error(reply)[1])
                assert error(reply)[0] == 503
            else:
                found.append(destination(reply))
    return found


@pytest.mark.parametrize(
    ("subset", "expected"),
    [
        ([FIRST, SECOND, THIRD], {FIRST, SECOND, THIRD}),
        ([THIRD], {THIRD}),
        ([THIRD, "10.9.9.9:1"], {THIRD}),
        ([THIRD, 5, None], {THIRD}),
        ([" 10.0.0.2 ", THIRD], {SECOND, THIRD}),
        (f"{SECOND}, {THIRD}", {SECOND, THIRD}),
        # The key of the subset is absent: the whole pool may be used.
        (None, {FIRST, SECOND, THIRD}),
        # An endpoint that this service does not know, or no endpoint at all.
        (["10.0.0.3:8001"], {"no_workers_in_subset"}),
        ([], {"no_workers_in_subset"}),
        ("", {"no_workers_in_subset"}),
        (7, {"no_workers_in_subset"}),
    ],
)
@pytest.mark.parametrize("mode", ["BUFFERED", "FULL_DUPLEX_STREAMED"])
async def test_only_endpoints_of_the_subset_are_chosen(
    subset: Any, expected: set[str], mode: str
) -> None:
    async with serving(Service(["m"], 3)) as service:
        assert set(await chosen(service, subset, 6, mode)) == expected


async def test_fallbacks_are_of_the_subset_as_well() -> None:
    async with serving(Service(["m"], 4, retry_busy=False)) as service:
        for named in await chosen(service, [SECOND, THIRD], 8):
            assert set(named.split(",")) == {SECOND, THIRD}


async def test_each_request_has_its_own_subset() -> None:
    async with serving(Service(["m"], 3)) as service:
        for subset in ([FIRST], [THIRD], [FIRST]):
            assert await chosen(service, subset, 1) == subset
