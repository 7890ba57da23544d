"""Finds what a test leaves open: descriptors, processes, threads, tasks, unclosed objects.

An unclosed object complains when the garbage collector finds it, in whichever test then
runs. These checks run at the end of each test instead, so that the right test fails.
"""

import asyncio
import contextlib
import gc
import os
import socket
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

from msgspec import Struct

__all__ = ["OpenThings", "lost_objects", "open_tasks"]

# Closing takes a moment: threads end, the other side of a connection notices.
_GRACE_SECONDS: Final = 2.0
_POLL_SECONDS: Final = 0.01
_PROCESS: Final = Path("/proc/self")


class OpenThings(Struct, frozen=True):
    """The descriptors, threads and child processes of this process at one moment."""

    names: Counter[str]

    @classmethod
    def now(cls) -> Self:
        return cls(Counter([*_descriptors(), *_threads(), *_children()]))

    def left_since(self) -> list[str]:
        """What is open in addition to that moment, after the time that closing may take."""
        deadline = time.monotonic() + _GRACE_SECONDS
        while True:
            left = self.now().names - self.names
            if not left or time.monotonic() > deadline:
                return sorted(left.elements())
            time.sleep(_POLL_SECONDS)


def lost_objects() -> list[str]:
    """The complaints of objects that the garbage collector finds unclosed."""
    found: list[str] = []

    def note(unraisable: "sys.UnraisableHookArgs") -> None:
        found.append(str(unraisable.exc_value))

    hook = sys.unraisablehook
    sys.unraisablehook = note
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gc.collect()
    finally:
        sys.unraisablehook = hook
    return found


async def open_tasks() -> list[str]:
    """The tasks of this event loop besides the caller, after the time that ending may take."""
    deadline = time.monotonic() + _GRACE_SECONDS
    while True:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        if not tasks or time.monotonic() > deadline:
            return sorted(map(repr, tasks))
        await asyncio.sleep(_POLL_SECONDS)


def _descriptors() -> Iterator[str]:
    for name in os.listdir(_PROCESS / "fd"):
        # The descriptor that listed the folder is closed by now.
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(_PROCESS / "fd" / name)
            yield _socket(int(name)) if target.startswith("socket:") else target


def _socket(descriptor: int) -> str:
    with socket.socket(fileno=os.dup(descriptor)) as one:
        peer = ""
        with contextlib.suppress(OSError):
            peer = f" connected to {one.getpeername()}"
        return f"{one.family.name} socket {one.getsockname()}{peer}"


def _threads() -> Iterator[str]:
    return (f"thread {one.name!r}" for one in threading.enumerate())


def _children() -> Iterator[str]:
    for task in os.listdir(_PROCESS / "task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for pid in (_PROCESS / "task" / task / "children").read_text().split():
                yield f"process {pid}: {_command(pid)}"


def _command(pid: str) -> str:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        line = Path("/proc", pid, "cmdline").read_bytes()
        return line.replace(b"\0", b" ").decode(errors="replace").strip() or "not waited for"
    return "gone"
