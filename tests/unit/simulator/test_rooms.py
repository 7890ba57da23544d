"""Which legs meet in a room, without sockets."""

import asyncio

import pytest

from extproc.simulator.rooms import Rooms, RoomTakenError

KEY = (0, 7)


async def started(rooms: Rooms, key: tuple[int, int] = KEY) -> asyncio.Task[None]:
    task = asyncio.ensure_future(rooms.take(key))
    await asyncio.sleep(0)
    return task


async def test_kv_is_taken_once_it_is_computed() -> None:
    rooms = Rooms()
    with rooms.offer(KEY) as offer:
        taker = await started(rooms)
        assert not taker.done()
        rooms.computed(KEY)
        await taker
        await offer.until_taken()
    assert len(rooms) == 0


async def test_the_decode_side_may_come_first_or_last() -> None:
    rooms = Rooms()
    first = await started(rooms)
    with rooms.offer(KEY):
        rooms.computed(KEY)
        await first
    with rooms.offer(KEY) as offer:
        rooms.computed(KEY)
        assert not offer.is_taken
        await rooms.take(KEY)
        assert offer.is_taken
    assert len(rooms) == 0


async def test_another_rank_or_room_is_another_place() -> None:
    rooms = Rooms()
    with rooms.offer(KEY) as offer:
        rooms.computed(KEY)
        lost = [await started(rooms, key) for key in ((1, 7), (0, 8))]
        assert not offer.is_taken
    for task in lost:
        task.cancel()
    await asyncio.wait(lost)
    assert len(rooms) == 0


async def test_kv_goes_to_a_request_that_still_waits() -> None:
    rooms = Rooms()
    gone, first, second = [await started(rooms) for _ in range(3)]
    gone.cancel()
    with rooms.offer(KEY):
        rooms.computed(KEY)
        await first
        assert not second.done()
    with rooms.offer(KEY):  # the second does not notice that the first offer is gone
        rooms.computed(KEY)
        await second
    await asyncio.wait([gone])
    assert len(rooms) == 0


async def test_a_withdrawn_offer_cannot_be_taken() -> None:
    rooms = Rooms()
    with rooms.offer(KEY):
        rooms.computed(KEY)
    taker = await started(rooms)
    assert not taker.done()
    taker.cancel()
    await asyncio.wait([taker])
    assert len(rooms) == 0


async def test_a_room_has_one_offer() -> None:
    rooms = Rooms()
    with rooms.offer(KEY), pytest.raises(RoomTakenError, match="7"), rooms.offer(KEY):
        pass
    with rooms.offer(KEY):
        pass
