"""Programs that live longer than one test, as children of a supervisor that ends with the tests.

The tests check that they leave no child process behind, so these are not children of the tests.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

__all__ = ["Programs"]

_STOP_SECONDS: Final = 30.0
_POLL_SECONDS: Final = 0.02
_LOG_CHARACTERS: Final = 4000


class Programs:
    """What runs, by name; each writes a log into `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._supervisor = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("supervisor.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, name: str, command: Sequence[str]) -> None:
        """Start a program; one of that name may have run before."""
        self._tell(start=name, command=list(command), log=str(self._folder / f"{name}.log"))

    def signal(self, name: str, number: int) -> int | None:
        """Signal a program, wait if it is SIGKILL; returns how it ended, None while it runs."""
        return self._tell(signal=number, name=name)

    def ended(self, name: str) -> int | None:
        """How the program ended, None while it runs."""
        return self.signal(name, 0)

    def stop(self, name: str) -> None:
        """End a program as Kubernetes does, and wait until it has ended."""
        self.signal(name, signal.SIGTERM)
        end = time.monotonic() + _STOP_SECONDS
        while self.ended(name) is None:
            assert time.monotonic() < end, f"{name} does not end:\n{self.log(name)}"
            time.sleep(_POLL_SECONDS)

    def log(self, name: str) -> str:
        """The end of what the program has written."""
        return (self._folder / f"{name}.log").read_text(errors="replace")[-_LOG_CHARACTERS:]

    def close(self) -> None:
        """End all programs."""
        self._supervisor.communicate()

    def _tell(self, **line: Any) -> int | None:
        assert self._supervisor.stdin is not None
        assert self._supervisor.stdout is not None
        self._supervisor.stdin.write(json.dumps(line) + "\n")
        self._supervisor.stdin.flush()
        ended: int | None = json.loads(self._supervisor.stdout.readline())
        return ended
