"""Spreads work of many workers over turns of the event loop, so that requests come in between.

A change of a cluster may concern a thousand workers at once. Each of them costs little, but all
of them in one turn would hold up every request.
"""

import asyncio

__all__ = ["Turns"]


class Turns:
    """Lets a number of tasks go on in each turn of the event loop, in the order of their calls."""

    def __init__(self, at_once: int) -> None:
        self._places = asyncio.Semaphore(at_once)

    async def wait(self) -> None:
        """Return in the next turn that has a place."""
        async with self._places:
            await asyncio.sleep(0)
