"""Host names of workers that a storm can move, without a DNS server and without root.

The service and Envoy run in a mount namespace of their own, where a file of this process is their
/etc/hosts. The system must allow user namespaces for that.
"""

import subprocess
from pathlib import Path
from typing import Final

__all__ = ["Names", "namespaces_work"]

_UNSHARE: Final = ("unshare", "--user", "--map-root-user", "--mount")
_MOUNT: Final = 'mount --bind "$0" /etc/hosts && exec "$@"'


def namespaces_work() -> bool:
    try:
        return subprocess.run([*_UNSHARE, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


class Names:
    """The names `worker-N.test`, each with one address or without one."""

    def __init__(self, file: Path, count: int) -> None:
        self._file = file
        self._addresses: dict[str, str | None] = {
            f"worker-{number}.test": "127.0.0.1" for number in range(count)
        }
        self._write()

    def name(self, number: int) -> str:
        return list(self._addresses)[number]

    def move(self, number: int, address: str | None) -> None:
        """Give the name another address of this machine; None removes the name."""
        self._addresses[self.name(number)] = address
        self._write()

    def _write(self) -> None:
        # In place: a bind mount follows the file and not its name.
        lines = [f"{address} {name}" for name, address in self._addresses.items() if address]
        self._file.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))

    def using(self, argv: list[str]) -> list[str]:
        """The command, for a process that resolves these names; it keeps its process id."""
        return [*_UNSHARE, "sh", "-c", _MOUNT, str(self._file), *argv]
