"""What vLLM says about itself: its models, and where it publishes KV events.

vLLM has no `/server_info`, except in its development mode, where it is another one. Its models are
in `/v1/models`, the publishers of its ranks in `/kv_event_sources` (0.32; older ones have to be
configured), and the size of its blocks in `/metrics`.
"""

import math
import re
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Final

import msgspec
from msgspec import Struct

from extproc.worker_url import WorkerUrl, parse_kv_endpoint
from extproc.workers.engine_calls import EngineAnswer
from extproc.workers.worker import KvEvents

__all__ = ["VllmLoad", "is_vllm", "read_vllm_load", "vllm_kv_events"]

_OWNER: Final = "vllm"
# vLLM's default; the events say what it is.
_BLOCK_SIZE: Final = 16
_BLOCK_MAX: Final = 65_536
_TOPIC_MAX_CHARS: Final = 256
_RUNNING: Final = b"vllm:num_requests_running"
_WAITING: Final = b"vllm:num_requests_waiting"
# The second name is that of older versions.
_USAGES: Final = (b"vllm:kv_cache_usage_perc", b"vllm:gpu_cache_usage_perc")
_CONFIG: Final = b"vllm:cache_config_info"
_LABEL: Final = re.compile(rb'([a-z_]+)="([^"\\]*)"')
_PAGE_MAX_BYTES: Final = 2 * 1024 * 1024
_SAMPLES_MAX: Final = 128
_LINE_MAX_BYTES: Final = 4096
_VALUE_MAX: Final = 1e9
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
    sizes = [_number(labels.get(b"block_size")) for labels, _ in _samples(metrics, _CONFIG)]
    return next((size for size in sizes if 1 <= size <= _BLOCK_MAX), _BLOCK_SIZE)


def read_vllm_load(metrics: bytes) -> dict[int, VllmLoad]:
    """The load of each engine of a server, by its number, from its `/metrics`.

    Engines without numbers of running and waiting requests are left out. The page is not trusted.
    """
    values: defaultdict[int, dict[bytes, float]] = defaultdict(dict)
    for name in (_RUNNING, _WAITING, *_USAGES):
        for labels, value in _samples(metrics, name):
            if math.isfinite(value) and 0 <= value <= _VALUE_MAX:
                values[_number(labels.get(b"engine"))][name] = value
    capacities = {
        _number(labels.get(b"engine")): _number(labels.get(b"block_size"))
        * _number(labels.get(b"num_gpu_blocks"))
        for labels, _ in _samples(metrics, _CONFIG)
    }
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


def _samples(metrics: bytes, name: bytes) -> Iterator[tuple[dict[bytes, bytes], float]]:
    """The labels and the value of each sample of a metric; values with escapes are left out.

    A complete parser of the format takes seconds for lines that were made for that.
    """
    if len(metrics) > _PAGE_MAX_BYTES:
        return
    head = b"\n" + name + b"{"
    start = metrics.find(head)
    for _ in range(_SAMPLES_MAX):
        if start < 0:
            return
        end = metrics.find(b"\n", start + 1)
        line = metrics[start + len(head) : end if end >= 0 else len(metrics)]
        start = metrics.find(head, start + 1)
        if len(line) > _LINE_MAX_BYTES:
            continue
        inner, closed, rest = line.rpartition(b"}")
        with suppress(ValueError, IndexError):
            if closed:
                yield dict(_LABEL.findall(inner)), float(rest.split()[0])


def _number(text: bytes | None) -> int:
    """The number in a label, 0 for other texts."""
    return int(text) if text and text.isdigit() and len(text) <= _DIGITS_MAX else 0
