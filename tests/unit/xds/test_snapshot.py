"""The resources that are made from workers."""

import asyncio

from extproc._protos import llm_extproc_pb2 as pb
from extproc.envoy_config.endpoints import Endpoint
from extproc.xds.snapshot import make_snapshot, prepare_entries

ENDPOINTS = [
    Endpoint(f"10.2.{n // 100}.{n % 100}:8000", f"http://10.2.{n // 100}.{n % 100}:8000")
    for n in range(300)
]


async def test_entries_of_many_workers_are_made_in_several_turns() -> None:
    others = 0

    async def count() -> None:
        nonlocal others
        while True:
            await asyncio.sleep(0)
            others += 1

    counting = asyncio.create_task(count())
    await prepare_entries(ENDPOINTS)
    counting.cancel()
    await asyncio.gather(counting, return_exceptions=True)
    assert others >= 5


async def test_a_worker_that_drains_and_serves_again_is_marked_each_time() -> None:
    one, other = ENDPOINTS[:2]
    states = [
        {one: False, other: False},
        {one: True, other: False},
        {one: False, other: True},
        {one: False, other: False},
    ]
    found = [make_snapshot({"w": state}, ())["w"] for state in states]
    assert found[0].version == found[3].version
    assert len({resource.version for resource in found}) == 3
    marks = []
    for resource in found:
        assignment = pb.ClusterLoadAssignment.FromString(resource.body)
        entries = assignment.endpoints[0].lb_endpoints
        marks.append([entry.health_status == pb.HealthStatus.DRAINING for entry in entries])
    assert marks == [[False, False], [True, False], [False, True], [False, False]]
