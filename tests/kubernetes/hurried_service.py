"""The service with a clock that goes twenty times as fast: ten minutes take thirty seconds.

Run as `python -m extproc` is. Intervals, time-outs and pauses of the service are shorter by as
much; time-outs of libraries are not.
"""

import asyncio
import sys
import time
from typing import Final

from extproc.cli import main
from extproc.clock import SystemClock

__all__ = ["HURRY"]

HURRY: Final = 20


async def _sleep(self: SystemClock, seconds: float) -> None:
    await asyncio.sleep(seconds / HURRY)


if __name__ == "__main__":
    setattr(SystemClock, "monotonic", staticmethod(lambda: time.monotonic() * HURRY))  # noqa: B010
    setattr(SystemClock, "sleep", _sleep)  # noqa: B010
    sys.exit(main())
