"""Reads the body fields that tell a disaggregated worker where its two legs meet.

SGLang 0.5: `bootstrap_host`, `bootstrap_port` and `bootstrap_room`, each a list with one item
for every prompt where the prompts are a list; `disagg_prefill_dp_rank` for the decode leg.
"""

from typing import Any, Final

import msgspec

from extproc.simulator.bodies import InferenceRequest
from extproc.simulator.errors import ApiError

__all__ = ["FAKE_HOST", "Meeting", "meetings", "prefill_rank"]

FAKE_HOST: Final = "2.2.2.2"  # as in the engine: no transfer takes place and no leg waits
_ROOMS: Final = 2**63
_PORTS: Final = 65_536


class Meeting(msgspec.Struct, frozen=True, kw_only=True):
    """Where the KV of one prompt is transferred; `port` None means the reader's own default."""

    host: str | None
    port: int | None
    room: int

    @property
    def is_fake(self) -> bool:
        return self.host == FAKE_HOST


def meetings(asked: InferenceRequest) -> list[Meeting]:
    """One meeting for every prompt; raises ApiError 400 for invalid fields."""
    return [
        Meeting(host=_host(host), port=_port(port), room=_room(room))
        for host, port, room in zip(
            _each(asked, "bootstrap_host"),
            _each(asked, "bootstrap_port"),
            _each(asked, "bootstrap_room", is_shared=False),
            strict=True,
        )
    ]


def prefill_rank(asked: InferenceRequest) -> int | None:
    """The rank of the prefill leg as the body names it; raises ApiError 400."""
    rank = asked.disagg_prefill_dp_rank
    if rank is None:
        return None
    if _is_integer(rank) and rank >= 0:
        return int(rank)
    raise ApiError(400, f"disagg_prefill_dp_rank: {rank!r} is not a rank")


def _each(asked: InferenceRequest, name: str, *, is_shared: bool = True) -> list[Any]:
    """The field for every prompt; with `is_shared` one value may serve all of them."""
    given, prompts = getattr(asked, name), len(asked.prompts)
    if isinstance(given, list):
        if asked.lists_prompts and len(given) == prompts:
            return given
        raise ApiError(400, f"{name}: {len(given)} in a list do not fit the prompts")
    if prompts > 1 and not is_shared and given is not None:
        raise ApiError(400, f"{name}: a batch of {prompts} prompts needs a list of them")
    return [given] * prompts


def _host(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise ApiError(400, f"bootstrap_host: {value!r} is not a string")


def _port(value: Any) -> int | None:
    if value is None:
        return None
    if _is_integer(value) and 0 < value < _PORTS:
        return int(value)
    raise ApiError(400, f"bootstrap_port: {value!r} is not a port")


def _room(value: Any) -> int:
    if value is None:
        raise ApiError(400, "Disaggregated request received without bootstrap room id")
    if _is_integer(value) and 0 <= value < _ROOMS:
        return int(value)
    raise ApiError(400, f"bootstrap_room: {value!r} is not an integer from 0 to 2**63 - 1")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
