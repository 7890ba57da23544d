"""Reads which named workers the gateway tried, from the two facts that it reports.

It reports the address that was tried last, and the number of attempts. Envoy tries the named
workers in order and passes over those that it does not know, which is not a failure of theirs.
Separate from the lease because this is arithmetic on three numbers.
"""

from typing import NamedTuple

__all__ = ["Walk", "read_walk"]


class Walk(NamedTuple):
    """Of the named workers the first `failed` were tried in vain, or the first `passed_over` were
    not tried, since the gateway does not know them. At most one of both is above 0: where a part
    of them was tried, nothing tells which, and both are 0.
    """

    failed: int
    passed_over: int


def read_walk(position: int, attempts: int, named: int) -> Walk:
    """Read a report about `named` workers.

    `position` is where the address that was tried last is in their list, -1 if it is not there.
    `attempts` is 0 where the gateway does not report it: then those before have failed.
    """
    if position < 0:
        return Walk(0, named if attempts <= 1 else 0)
    if attempts in (0, position + 1):
        return Walk(position, 0)
    return Walk(0, position if attempts == 1 else 0)
