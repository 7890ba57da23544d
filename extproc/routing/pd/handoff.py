"""The JSON members by which a prefill and a decode worker find each other.

SGLang: host and port of the prefill worker, and a room, one for each prompt of a batch. The
engine computes the prefill rank from the room (room mod dp_size), so the room carries the rank to
both sides. vLLM: `kv_transfer_params`, which the prefill request asks for, and whose value in the
answer goes into the decode request.
"""

import re
import secrets
from typing import Any, Final

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from extproc.errors import bad_request
from extproc.routing.request import Request

__all__ = [
    "bootstrap_members",
    "kv_decode_members",
    "prompts_of_a_batch",
]

_ROOMS: Final = 1 << 63
_BATCH_MAX: Final = 4096


class _Answer(Struct):
    kv_transfer_params: Raw | UnsetType = UNSET


_prompts_decoder: Final = msgspec.json.Decoder(list[Raw])
# Not a list, an empty list, or a list of numbers, which is one prompt.
_NOT_A_BATCH: Final = re.compile(rb"(?!\[)|\[\s*[\]\-0-9]")
_answer_decoder: Final = msgspec.json.Decoder(_Answer)


def prompts_of_a_batch(request: Request) -> int | None:
    """Return the number of prompts in a batch; None if the body is not a batch.

    Raises RouterError for a batch that is too large.
    """
    if _NOT_A_BATCH.match(request.prompts):
        return None
    prompts = _prompts_decoder.decode(request.prompts)
    if len(prompts) > _BATCH_MAX:
        raise bad_request(f"a batch of more than {_BATCH_MAX} prompts")
    return len(prompts)


def bootstrap_members(
    host: str, port: int | None, *, dp_rank: int, dp_size: int, prompts: int | None
) -> bytes:
    """Return `bootstrap_host`, `_port` and `_room`; for a batch, lists with one for each prompt."""
    fields: tuple[Any, Any, Any]
    if prompts is None:
        fields = host, port, _room(dp_rank, dp_size)
    else:
        rooms = [_room(dp_rank, dp_size) for _ in range(prompts)]
        fields = [host] * prompts, [port] * prompts, rooms
    encode = msgspec.json.encode
    return b'"bootstrap_host":%b,"bootstrap_port":%b,"bootstrap_room":%b' % (
        encode(fields[0]),
        encode(fields[1]),
        encode(fields[2]),
    )


def _room(dp_rank: int, dp_size: int) -> int:
    """Return a random number below 2^63 that is the rank modulo dp_size."""
    return secrets.randbelow((_ROOMS - dp_rank + dp_size - 1) // dp_size) * dp_size + dp_rank


def kv_decode_members(answer: bytes) -> bytes | None:
    """Return the member of a prefill worker's answer that decode needs, None if it is missing."""
    try:
        answer.decode()  # the decoder does not validate members that it skips
        params = _answer_decoder.decode(answer).kv_transfer_params
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if params is UNSET or not params or bytes(params).lstrip()[:1] != b"{":
        return None
    return b'"kv_transfer_params":' + bytes(params)
