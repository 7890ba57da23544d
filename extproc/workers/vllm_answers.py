"""What vLLM says about itself: its models, and where it publishes KV events.

vLLM has no `/server_info`, except in its development mode, where it is another one. Its models are
in `/v1/models`, the publishers of its ranks in `/kv_event_sources` (0.32; older ones have to be
configured), and the size of its blocks in `/metrics`.
"""

import math
import re
from collections import defaultdict
from collections.abc import Awaitable, Callable
from itertools import islice
from typing import Final

import msgspec
from msgspec import Struct
from prometheus_client.parser import text_string_to_metric_families

from extproc.worker_url import WorkerUrl, parse_kv_endpoint
from extproc.workers.engine_calls import EngineAnswer
from extproc.workers.worker import KvEvents

__all__ = ["VllmLoad", "is_vllm", "read_vllm_load", "vllm_kv_events"]

_OWNER: Final = "vllm"
# vLLM's default; the events say what it is.
_BLOCK_SIZE: Final = 16
_BLOCK_MAX: Final = 65_536
_TOPIC_MAX_CHARS: Final = 256
_CACHE_CONFIG: Final = b"vllm:cache_config_info{"
_RUNNING: Final = "vllm:num_requests_running"
_WAITING: Final = "vllm:num_requests_waiting"
# The second name is that of older versions.
_USAGES: Final = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
_CONFIG: Final = "vllm:cache_config_info"
_NAMES: Final = "|".join(re.escape(name) for name in (_RUNNING, _WAITING, *_USAGES, _CONFIG))
_LOAD_LINES: Final = re.compile(rf"^(?:{_NAMES})\{{[^\n]{{0,4096}}$".encode(), re.MULTILINE)
_LINES_MAX: Final = 1024
_DIGITS_MAX: Final = 12


class _Source(Struct):
    endpoint: str
    replay_endpoint: str | None = None
    topic: str = ""


class VllmLoad(Struct, frozen=True, kw_only=True):
    """The load of one rank; a LoadReport with what vLLM has of it.

    Tokens are those of the blocks in use and of all blocks.
    """

    num_running_reqs: int
    num_waiting_reqs: int
    num_tokens: int
    max_total_num_tokens: int
    num_waiting_uncached_tokens: int | None = None
    max_running_requests: int | None = None
    total_prefill_uncached_tokens: int | None = None
    total_prefill_busy_us: int | None = None


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


def read_vllm_load(metrics: bytes) -> dict[int, VllmLoad]:
    """The load of each engine of a server, by its number, from its `/metrics`.

    Engines without numbers of running and waiting requests are left out. The page is not trusted.
    """
    lines = [found.group() for found in islice(_LOAD_LINES.finditer(metrics), _LINES_MAX)]
    values: defaultdict[int, dict[str, float]] = defaultdict(dict)
    capacities: dict[int, int] = {}
    try:
        families = list(text_string_to_metric_families(b"\n".join([*lines, b""]).decode()))
    except ValueError:
        return {}
    for sample in [sample for family in families for sample in family.samples]:
        engine = _number(sample.labels.get("engine", "0"))
        if sample.name == _CONFIG:
            size, blocks = (sample.labels.get(key, "") for key in ("block_size", "num_gpu_blocks"))
            capacities[engine] = _number(size) * _number(blocks)
        elif math.isfinite(sample.value) and sample.value >= 0:
            values[engine][sample.name] = sample.value
    found: dict[int, VllmLoad] = {}
    for engine, seen in values.items():
        if _RUNNING in seen and _WAITING in seen:
            capacity = capacities.get(engine, 0)
            usage = next((seen[name] for name in _USAGES if name in seen), 0.0)
            found[engine] = VllmLoad(
                num_running_reqs=int(seen[_RUNNING]),
                num_waiting_reqs=int(seen[_WAITING]),
                num_tokens=int(min(1.0, usage) * capacity),
                max_total_num_tokens=capacity,
            )
    return found


def _number(text: str) -> int:
    """The number in a label, 0 for other texts."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _DIGITS_MAX else 0
