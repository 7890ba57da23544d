"""Ports that are not free yet."""

import asyncio
import errno
from collections.abc import Awaitable, Callable

__all__ = ["with_patience"]

_PATIENCE_SECONDS = 1.0
_POLL_SECONDS = 0.02


async def with_patience(bind: Callable[[], Awaitable[None]]) -> None:
    """Bind, again and again for a moment while a port is taken.

    A worker that was killed gives its ports back a moment later, when another may be starting
    in its place. Raises OSError.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _PATIENCE_SECONDS
    while True:
        try:
            return await bind()
        except OSError as error:
            if error.errno != errno.EADDRINUSE or loop.time() >= deadline:
                raise
        await asyncio.sleep(_POLL_SECONDS)
