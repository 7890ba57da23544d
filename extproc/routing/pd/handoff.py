"""What prefill and decode workers must find in a request's body to meet, as JSON members.

SGLang: host and port of the prefill worker, and a room, one for each prompt of a batch. The
engine takes the prefill rank from the room (room mod dp_size), so that a room tells the rank to
both sides. vLLM: `kv_transfer_params`, asked for with the prefill and passed on to decode.
"""

import re
import secrets
from typing import Any, Final

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from extproc.errors import bad_request
from extproc.routing.request import Request

__all__ = ["KV_PREFILL_MEMBERS", "bootstrap_members", "kv_decode_members", "prompts_of_a_batch"]

_ROOMS: Final = 1 << 63
_BATCH_MAX: Final = 4096

# One token, in one piece: what comes of the prefill is its cache. Behind the client's own
# members, of which the last counts.
KV_PREFILL_MEMBERS: Final = (
    b'"stream":false,"stream_options":null,"max_tokens":1,"max_completion_tokens":1,'
    b'"min_tokens":0,"kv_transfer_params":{"do_remote_decode":true,"do_remote_prefill":false,'
    b'"remote_engine_id":null,"remote_block_ids":null,"remote_host":null,"remote_port":null}'
)


class _Answer(Struct):
    kv_transfer_params: Raw | UnsetType = UNSET


_prompts_decoder: Final = msgspec.json.Decoder(list[Raw])
# No list, an empty one, or a list of numbers, which is one prompt.
_NOT_A_BATCH: Final = re.compile(rb"(?!\[)|\[\s*[\]\-0-9]")
_answer_decoder: Final = msgspec.json.Decoder(_Answer)


def prompts_of_a_batch(request: Request) -> int | None:
    """How many prompts the body has if it is a batch; None if it is not, or no engine takes it.

    Raises RouterError for one that is too large.
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
    """`bootstrap_host`, `_port` and `_room`; lists of `prompts` each where it is not None."""
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
    """Random below 2^63, and congruent to the rank."""
    return secrets.randbelow((_ROOMS - dp_rank + dp_size - 1) // dp_size) * dp_size + dp_rank


def kv_decode_members(answer: bytes) -> bytes | None:
    """What a prefill worker's answer has for the decode worker; None if it has nothing."""
    try:
        answer.decode()  # what is not read is not validated
        params = _answer_decoder.decode(answer).kv_transfer_params
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if params is UNSET or not params or bytes(params).lstrip()[:1] != b"{":
        return None
    return b'"kv_transfer_params":' + bytes(params)
