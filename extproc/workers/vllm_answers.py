"""What vLLM says about itself: its models, and where it publishes KV events.

vLLM has no `/server_info`, except in its development mode, where it is another one. Its models are
in `/v1/models`, the publishers of its ranks in `/kv_event_sources` (0.32; older ones have to be
configured), and the size of its blocks in `/metrics`.
"""

from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
from msgspec import Struct
from prometheus_client.parser import text_string_to_metric_families

from extproc.worker_url import WorkerUrl, parse_kv_endpoint
from extproc.workers.engine_calls import EngineAnswer
from extproc.workers.worker import KvEvents

__all__ = ["is_vllm", "vllm_kv_events"]

_OWNER: Final = "vllm"
# vLLM's default; the events say what it is.
_BLOCK_SIZE: Final = 16
_BLOCK_MAX: Final = 65_536
_TOPIC_MAX_CHARS: Final = 256
_CACHE_CONFIG: Final = b"vllm:cache_config_info{"


class _Source(Struct):
    endpoint: str
    replay_endpoint: str | None = None
    topic: str = ""


class _Owned(Struct):
    owned_by: str = ""


class _Owners(Struct):
    data: list[_Owned]


def is_vllm(models: bytes) -> bool:
    """True if an answer to `/v1/models` is vLLM's."""
    try:
        owners = msgspec.json.decode(models, type=_Owners)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return any(one.owned_by == _OWNER for one in owners.data)


async def vllm_kv_events(
    get: Callable[[str], Awaitable[EngineAnswer]],
    url: WorkerUrl,
    ranks_max: int,
    known: KvEvents | None,
) -> KvEvents | None:
    """Where this worker publishes KV events, None if it does not say or does not publish.

    Only ports and topic are taken from the answers, never a host. `known` is what was found
    before: while that holds, the size of the blocks is not asked for again. Raises ValueError,
    which says what cannot be used.
    """
    answer = await get("/kv_event_sources")
    if answer.status != 200:
        return None
    try:
        sources = msgspec.json.decode(answer.body, type=dict[int, _Source])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError("/kv_event_sources cannot be read") from None
    if not sources:
        return None
    if len(sources) > ranks_max:
        raise ValueError(f"/kv_event_sources names more than {ranks_max} ranks")
    found = _united([sources[rank] for rank in sorted(sources)], url)
    if known is not None and known == msgspec.structs.replace(found, block_size=known.block_size):
        return known
    metrics = await get("/metrics")
    size = _block_size(metrics.body) if metrics.status == 200 else _BLOCK_SIZE
    return msgspec.structs.replace(found, block_size=size)


def _united(sources: list[_Source], url: WorkerUrl) -> KvEvents:
    """The publishers of all ranks, in their order; rank r uses each port plus r."""
    first = sources[0]
    if len(first.topic) > _TOPIC_MAX_CHARS or any(one.topic != first.topic for one in sources):
        raise ValueError("/kv_event_sources has a topic that cannot be used")
    replays = [one.replay_endpoint for one in sources if one.replay_endpoint is not None]
    if replays and len(replays) != len(sources):
        raise ValueError("/kv_event_sources has a replay_endpoint for some ranks only")
    return KvEvents(
        host=url.host,
        port=_first_port([one.endpoint for one in sources]),
        block_size=_BLOCK_SIZE,
        topic=first.topic,
        dp_size=len(sources),
        replay_port=_first_port(replays) if replays else None,
    )


def _first_port(endpoints: list[str]) -> int:
    try:
        ports = [parse_kv_endpoint(endpoint)[1] for endpoint in endpoints]
    except ValueError:
        raise ValueError("/kv_event_sources has an endpoint that is no tcp:// address") from None
    if ports != list(range(ports[0], ports[0] + len(ports))):
        raise ValueError("/kv_event_sources has ports that do not follow each other")
    return ports[0]


def _block_size(metrics: bytes) -> int:
    """The tokens of a block by `vllm:cache_config_info`, vLLM's default if that does not say."""
    start = metrics.find(b"\n" + _CACHE_CONFIG)
    line = metrics[start + 1 :].partition(b"\n")[0] if start >= 0 else b""
    try:
        for family in text_string_to_metric_families(line.decode() + "\n"):
            for sample in family.samples:
                size = int(sample.labels.get("block_size", ""))
                if 1 <= size <= _BLOCK_MAX:
                    return size
    except ValueError:
        pass
    return _BLOCK_SIZE
