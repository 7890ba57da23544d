"""Real engine servers as processes; they run for all tests that use them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from extproc.testing.stack import reserved_ports

__all__ = ["EngineServer", "Pair", "Servers", "start_together", "wait_ready"]

# Two cores compile, import and load all servers at once.
_START_SECONDS: Final = 600
_STOP_SECONDS: Final = 20
_POLL_SECONDS: Final = 0.2
_LOG_TAIL_BYTES: Final = 4000
# Becomes the program that is named, with less priority. It ends when the tests are killed.
_BECOME: Final = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.nice(5); "
    "os.execvp(sys.argv[1], sys.argv[1:])"
)


class EngineServer:
    """One server of an engine on a port that stays its own over restarts."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], port: int, log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self._argv = argv
        # Engines import for half a minute, and several times as long without files of bytecode.
        self._env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", **env}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as output:
            # A group of its own: an engine has processes of its own, which are killed with it.
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BECOME, *self._argv],
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def is_ready(self) -> bool:
        """True once it answers; raises RuntimeError with its output if it has ended."""
        if self._process is None or self._process.poll() is not None:
            raise RuntimeError(f"{self._argv[0]} has ended:\n{self._tail()}")
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def kill(self) -> None:
        """End it and its own processes as a crash does."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_SECONDS)
        self.kill()

    def _tail(self) -> str:
        return self.log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")


class Pair:
    """Two servers with the same model."""

    def __init__(self, model: Path, servers: list[EngineServer]) -> None:
        self.model = model
        self.servers = servers

    @property
    def urls(self) -> list[str]:
        return [server.url for server in self.servers]


def start_together(servers: Sequence[EngineServer]) -> None:
    """Start them at once and wait until all answer; raises RuntimeError if one does not."""
    for server in servers:
        server.start()
    wait_ready(servers)


def wait_ready(servers: Sequence[EngineServer]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    waiting = list(servers)
    while waiting:
        waiting = [server for server in waiting if not server.is_ready()]
        if waiting and time.monotonic() > deadline:
            raise RuntimeError(f"{waiting[0].url} is not ready:\n{waiting[0].log}")
        time.sleep(_POLL_SECONDS)


class Servers(contextlib.ExitStack):
    """Servers, which are stopped at the end, and the ports that are theirs until then."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def add(self, ports_each: int, make: Callable[[list[int], Path], EngineServer]) -> EngineServer:
        """A server that is started later; `make` gets its ports and a file for its output."""
        ports = self.enter_context(reserved_ports(ports_each))
        server = make(ports, self._folder / f"engine-{ports[0]}.log")
        self.callback(server.stop)
        return server
