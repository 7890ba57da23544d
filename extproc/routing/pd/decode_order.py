"""What the pass that picks the decode worker has to know, as the value of a header.

The passes of one request can reach different replicas, and none of them may try a worker twice.
So the first pass deals the decode pool out into as many hands as there are attempts, and an
attempt picks from its own hand only, by the load of that moment.
"""

from typing import Final, NamedTuple, Self

__all__ = ["DecodeOrder"]

_FIELDS: Final = 4
_ADDRESSES_MAX: Final = 64


class DecodeOrder(NamedTuple):
    """`addresses` are `ip:port`, best first. `pair` names the request in the replica that has
    its first pass; `prefill_host` is the host of its prefill worker.
    """

    attempts: int
    prefill_host: str
    pair: str
    addresses: tuple[str, ...]

    def attempt_group(self, attempt: int) -> tuple[str, ...]:
        """The addresses that attempt 1, 2, … may choose from."""
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
