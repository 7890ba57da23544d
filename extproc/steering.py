"""The table of body members and headers by which a request steers an engine.

An engine obeys them from any sender: it runs the request on the rank that is named, connects to
the host that is named, or reads the cache blocks that are named. Only this service may send
them, so those of a client are removed on every path. The names are those of SGLang 0.5.23
(`PDRoutingFields`, `GenerateReqInput`, `request_headers`), vLLM 0.32 (`protocol.py` of each API)
and llm-d's sidecar. A new one is added here and nowhere else.

What a client says about its own request stays: `rid`, `priority`, `cache_salt`, `session_id`.
"""

import re
from operator import attrgetter
from typing import Final

from msgspec import Raw, Struct

__all__ = [
    "DATA_PARALLEL_RANK_HEADER",
    "MEMBER_MAPS",
    "STEERING_HEADER_PATTERN",
    "STEERING_HEADER_PREFIXES",
    "STEERING_MEMBERS",
    "SteeringMembers",
    "is_steered",
    "is_steering_header",
    "present_members",
]

_ABSENT: Final = Raw(b"")


class SteeringMembers(Struct):
    """Base of the structs that a body is decoded to, so that these members are seen on the way.

    The JSON parser compares names after it has undone escapes. A member that occurs is never
    equal to its default, not even if its value is null.
    """

    # The prefill worker and the room where a decode worker fetches its KV cache (SGLang).
    bootstrap_host: Raw = _ABSENT
    bootstrap_port: Raw = _ABSENT
    bootstrap_room: Raw = _ABSENT
    bootstrap_pair_key: Raw = _ABSENT
    decode_tp_size: Raw = _ABSENT
    # The data-parallel rank; the last name is the older one of the first (SGLang).
    routed_dp_rank: Raw = _ABSENT
    disagg_prefill_dp_rank: Raw = _ABSENT
    data_parallel_rank: Raw = _ABSENT
    # Hosts that compute the embeddings of images, and whether to wait for them (SGLang).
    encoder_urls: Raw = _ABSENT
    need_wait_for_mm_inputs: Raw = _ABSENT
    num_items_assigned: Raw = _ABSENT
    # The socket to which the output is sent (SGLang).
    http_worker_ipc: Raw = _ABSENT
    # Host and blocks of a cache to fetch, of prompts and of images (vLLM).
    kv_transfer_params: Raw = _ABSENT
    ec_transfer_params: Raw = _ABSENT
    # Lets an engine announce again what it holds, without a copy (vLLM).
    kv_cache_report_mode: Raw = _ABSENT
    # Not a steering member itself, see MEMBER_MAPS.
    vllm_xargs: Raw = _ABSENT


# vLLM merges the members of this object into the same map as `kv_transfer_params`.
MEMBER_MAPS: Final = ("vllm_xargs",)
STEERING_MEMBERS: Final = frozenset(SteeringMembers.__struct_fields__) - {*MEMBER_MAPS}

_values_of: Final = attrgetter(*SteeringMembers.__struct_fields__)
_ALL_ABSENT: Final = (_ABSENT,) * len(SteeringMembers.__struct_fields__)


def is_steered(members: SteeringMembers) -> bool:
    """True if the body may have one of STEERING_MEMBERS, at its top or in one of MEMBER_MAPS."""
    return bool(_values_of(members) != _ALL_ABSENT)


def present_members(members: SteeringMembers) -> dict[str, Raw]:
    """The values that occur in the body, by name: STEERING_MEMBERS and MEMBER_MAPS."""
    found = zip(SteeringMembers.__struct_fields__, _values_of(members), strict=True)
    return {name: value for name, value in found if value is not _ABSENT}


# SGLang and vLLM take the data-parallel rank from this header in place of the body's.
DATA_PARALLEL_RANK_HEADER: Final = "x-data-parallel-rank"

# Families of headers rather than names: SGLang sets the fields of a table that grows from
# x-override-*, and llm-d's sidecar connects to the hosts that the others name.
STEERING_HEADER_PREFIXES: Final = (
    "x-data-parallel-",
    "x-encoder-hosts-",
    "x-kv-cache-source-",
    "x-override-",
    "x-prefiller-",
)

# All of them as a regular expression (RE2) for a lower-case name. Servers that follow CGI do not
# tell `_` from `-`. Envoy refuses expressions of more than 100 instructions.
_FAMILIES: Final = "|".join(prefix.replace("-", "[-_]") for prefix in STEERING_HEADER_PREFIXES)
STEERING_HEADER_PATTERN: Final = f"({_FAMILIES}).*"
_matches: Final = re.compile(STEERING_HEADER_PATTERN, re.IGNORECASE).fullmatch


def is_steering_header(name: str) -> bool:
    """True for a header of the table, in upper or lower case and with `_` or `-`."""
    return _matches(name) is not None
