"""Finds the port of a worker among those that an object of the cluster names."""

from collections.abc import Iterable
from typing import Final

__all__ = ["pick_port"]

# SGLang's own port, used where neither the object nor the configuration names one.
_DEFAULT_PORT: Final = 30000
_TCP: Final = "TCP"


def pick_port(
    named: Iterable[tuple[str | None, int | None, str | None]],
    *,
    name: str | None,
    number: int | None,
) -> int | None:
    """By name, then by number, then the first one; None if no port has that name.

    `named` are name, number and protocol of each port; without a protocol it is TCP.
    """
    usable = [(each, port) for each, port, kind in named if port and (kind or _TCP) == _TCP]
    if name is not None:
        return next((port for each, port in usable if each == name), number)
    if number is not None:
        return number
    return usable[0][1] if usable else _DEFAULT_PORT
