"""The header by which the first pass passes on what the second pass must know.

The passes of one request can reach different replicas, and no worker may be tried twice. So the
first pass divides the decode workers into as many groups as there are attempts. An attempt picks
from its own group only, by the load at that moment.
"""

from typing import Final, NamedTuple, Self

__all__ = ["DecodeOrder", "DecodeQuery"]

_FIELDS: Final = 4
_ADDRESSES_MAX: Final = 64


class DecodeOrder(NamedTuple):
    """`addresses` are `ip:port`, best first. `pair` is the id of the request's pair in the replica
    that has its first pass; `prefill_host` is the host of its prefill worker.
    """

    attempts: int
    prefill_host: str
    pair: str
    addresses: tuple[str, ...]

    def attempt_group(self, attempt: int) -> tuple[str, ...]:
        """Return the addresses that attempt 1, 2, … may choose from."""
        if not 1 <= attempt <= self.attempts:
            return ()
        return self.addresses[attempt - 1 :: self.attempts]

    def to_header(self) -> str:
        addresses = ",".join(self.addresses[:_ADDRESSES_MAX])
        return f"{self.attempts};{self.prefill_host};{self.pair};{addresses}"

    @classmethod
    def from_header(cls, value: str) -> Self:
        """Raises ValueError."""
        parts = value.split(";")
        if len(parts) != _FIELDS or not parts[0].isdecimal() or not 0 < int(parts[0]) < 100:
            raise ValueError("not a decode order")
        attempts, host, pair, addresses = parts
        return cls(int(attempts), host, pair, tuple([one for one in addresses.split(",") if one]))


class DecodeQuery(NamedTuple):
    """Asks the second pass for the decode worker of attempt 1, 2, … of a request."""

    model: str
    order: DecodeOrder
    attempt: int
