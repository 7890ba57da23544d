"""Closes the fleets that a test has made: their routers hold sockets for KV events."""

from collections.abc import AsyncIterator

import pytest

from tests.unit.routing.pd.pd_fleet import PdFleet


@pytest.fixture(autouse=True)
async def close_fleets() -> AsyncIterator[None]:
    yield
    while PdFleet.made:
        await PdFleet.made.pop().close()
