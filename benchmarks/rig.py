"""Starts one Envoy with three listeners, a fake upstream, the service and the bare responder.

The listeners without a filter and with the bare responder are derived from the rendered one.
Limits, header mutations and local replies are therefore the same for all three, and the filter
is the only difference. The upstream is an Envoy that answers by itself, since its cost must be
small and constant.
"""

import asyncio
import contextlib
import copy
import enum
import json
import signal
import sys
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import aiohttp
import yaml
from msgspec import Struct

from extproc.envoy_config.wire_form import socket_address, typed
from extproc.headers import EXTPROC_CLUSTER, EXTPROC_FILTER
from extproc.testing.stack import ManagedProcess, Stack, find_envoy, free_ports

__all__ = [
    "MODEL",
    "Arm",
    "KvBlock",
    "Rig",
    "ServerInfo",
    "derive_listeners",
    "run_until_signal",
    "running_rig",
]

MODEL: Final = "benchmark-model"
_WORKERS: Final = 3
_BARE_CLUSTER: Final = "bare_responder"
_ROUTER_FILTER = "envoy.filters.http.router"
_BODY_LIMIT_BYTES: Final = 64 * 1024 * 1024
_HEADER_MUTATION: Final = "OVERWRITE_IF_EXISTS_OR_ADD"
_ANSWER: Final = {
    "id": "chatcmpl-0",
    "object": "chat.completion",
    "model": MODEL,
    "choices": [
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "A short answer."},
        }
    ],
}


class Arm(enum.StrEnum):
    """The compared listeners."""

    NONE = "no filter"
    BARE = "bare"
    OURS = "ours"


class Rig(Struct, frozen=True, kw_only=True):
    """The URL of each arm, and the processes to measure."""

    urls: dict[Arm, str]
    admin_url: str
    envoy: int
    upstream: int
    servers: dict[Arm, int]


# The `kv_events` block of a worker's introspection.
KvBlock = Mapping[str, Any]
# A worker's introspection answer. With `answers`, those by path are given instead, a text as it is;
# `/server_info` is 404 then.
ServerInfo = Mapping[str, Any]


@contextlib.asynccontextmanager
async def running_rig(
    folder: Path,
    *,
    model: Mapping[str, Any] | None = None,
    kv_blocks: Sequence[KvBlock | None] = (None,) * _WORKERS,
    others: Sequence[ServerInfo] = (),
    settings: Mapping[str, Any] | None = None,
) -> AsyncIterator[Rig]:
    """Start all parts and wait until they are healthy; stop them at the end of the block.

    `model` adds to the model's configuration. There is a worker for each of `kv_blocks`, and
    one for each of `others`, of the model named there. `settings` add to the service's.
    """
    infos: list[ServerInfo] = [
        {
            "served_model_name": MODEL,
            "disaggregation_mode": "null",
            "kv_events": None if block is None else dict(block),
        }
        for block in kv_blocks
    ]
    infos += others
    models = dict.fromkeys(str(info["served_model_name"]) for info in infos)
    async with contextlib.AsyncExitStack() as stack:
        *worker_ports, admin_port, bare_port, no_filter_port, with_bare_port = free_ports(
            len(infos) + 4
        )
        upstream = await _upstream(
            stack, folder, dict(zip(worker_ports, infos, strict=True)), admin_port
        )
        addresses = [f"127.0.0.1:{port}" for port in worker_ports]
        bare = await _bare(stack, folder, bare_port, addresses)

        def edit(bootstrap: dict[str, Any]) -> None:
            derive_listeners(
                bootstrap,
                no_filter_port=no_filter_port,
                with_bare_port=with_bare_port,
                bare_port=bare_port,
            )

        service = await stack.enter_async_context(
            Stack(
                folder,
                [f"http://{address}" for address in addresses],
                {
                    "models": [
                        {"id": name, **((model or {}) if name == MODEL else {})} for name in models
                    ],
                    "envoy": {"access_log": None},
                    **(settings or {}),
                },
                edit_bootstrap=edit,
            )
        )
        await service.envoy.wait_ready(
            lambda: _answers(
                f"{service.envoy_admin_url}/stats?filter={_BARE_CLUSTER}.membership_healthy",
                "membership_healthy: 1",
            )
        )
        yield Rig(
            urls={
                Arm.NONE: f"http://127.0.0.1:{no_filter_port}",
                Arm.BARE: f"http://127.0.0.1:{with_bare_port}",
                Arm.OURS: service.url,
            },
            admin_url=service.admin_url,
            envoy=service.envoy.pid,
            upstream=upstream.pid,
            servers={Arm.BARE: bare.pid, Arm.OURS: service.service.pid},
        )


def derive_listeners(
    bootstrap: dict[str, Any], *, no_filter_port: int, with_bare_port: int, bare_port: int
) -> None:
    """Add the listeners of the other two arms, and the cluster of the bare responder."""
    resources = bootstrap["static_resources"]
    ingress = resources["listeners"][0]
    workers, *others = resources["clusters"]
    (extproc,) = (cluster for cluster in others if cluster["name"] == EXTPROC_CLUSTER)

    bare_cluster = _copied(extproc, _BARE_CLUSTER)
    bare_cluster["load_assignment"] = _assignment(_BARE_CLUSTER, bare_port)
    resources["clusters"].append(bare_cluster)

    with_bare = _listener(ingress, "with_bare", with_bare_port)
    filters = _manager(with_bare)["http_filters"]
    (ext_proc,) = (each for each in filters if each["name"] == EXTPROC_FILTER)
    ext_proc["typed_config"]["grpc_service"]["envoy_grpc"]["cluster_name"] = _BARE_CLUSTER

    no_filter = _listener(ingress, "no_filter", no_filter_port)
    manager = _manager(no_filter)
    manager["http_filters"] = [
        each for each in manager["http_filters"] if each["name"] == _ROUTER_FILTER
    ]
    (virtual_host,) = manager["route_config"]["virtual_hosts"]
    (decided,) = (route for route in virtual_host["routes"] if route["name"] == "decided")
    decided["match"] = {"prefix": "/"}
    del decided["route"]["cluster_header"]
    decided["route"]["cluster"] = workers["name"]
    virtual_host["routes"] = [decided]

    resources["listeners"] += [with_bare, no_filter]


async def run_until_signal(work: Coroutine[Any, Any, int]) -> int:
    """Run a benchmark; SIGTERM ends it as Ctrl-C does, with all processes stopped."""
    task = asyncio.ensure_future(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        sys.stderr.write("interrupted\n")
        return 130


async def _upstream(
    stack: contextlib.AsyncExitStack,
    folder: Path,
    workers: Mapping[int, ServerInfo],
    admin_port: int,
) -> ManagedProcess:
    config = folder / "upstream.yaml"
    config.write_text(yaml.safe_dump(_upstream_bootstrap(workers, admin_port)))
    last = list(workers)[-1]
    process = ManagedProcess(
        "upstream",
        [
            find_envoy(),
            *("-c", str(config)),
            *("--concurrency", "1", "--use-dynamic-base-id", "--log-level", "warning"),
        ],
        folder / "upstream.log",
    )
    await _start(stack, process)
    name = str(workers[last]["served_model_name"])
    path = "/v1/models" if "answers" in workers[last] else "/server_info"
    await process.wait_ready(lambda: _answers(f"http://127.0.0.1:{last}{path}", name))
    return process


async def _bare(
    stack: contextlib.AsyncExitStack, folder: Path, port: int, addresses: list[str]
) -> ManagedProcess:
    workers = [part for address in addresses for part in ("--worker", address)]
    process = ManagedProcess(
        "bare responder",
        [
            *(sys.executable, "-m", "benchmarks.bare_responder"),
            *("--port", str(port), "--model", MODEL, *workers),
        ],
        folder / "bare.log",
    )
    await _start(stack, process)
    return process


async def _start(stack: contextlib.AsyncExitStack, process: ManagedProcess) -> None:
    # Register the clean-up first: a Ctrl-C during the start must not leave the process behind.
    stack.push_async_callback(process.stop)
    await process.start()


async def _answers(url: str, text: str) -> bool:
    timeout = aiohttp.ClientTimeout(total=5)
    try:
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as response:
            return response.status == 200 and text in await response.text()
    except (aiohttp.ClientError, OSError, TimeoutError):
        return False


def _copied(part: dict[str, Any], name: str) -> dict[str, Any]:
    copied = copy.deepcopy(part)
    copied["name"] = name
    return copied


def _manager(listener: dict[str, Any]) -> dict[str, Any]:
    manager: dict[str, Any] = listener["filter_chains"][0]["filters"][0]["typed_config"]
    return manager


def _listener(ingress: dict[str, Any], name: str, port: int) -> dict[str, Any]:
    listener = _copied(ingress, name)
    listener["address"] = socket_address("127.0.0.1", port)
    _manager(listener)["stat_prefix"] = name
    return listener


def _assignment(cluster: str, port: int) -> dict[str, Any]:
    endpoint = {"endpoint": {"address": socket_address("127.0.0.1", port)}}
    return {"cluster_name": cluster, "endpoints": [{"lb_endpoints": [endpoint]}]}


def _manager_of_worker(info: ServerInfo) -> dict[str, Any]:
    answers: Mapping[str, Any] | None = info.get("answers")
    if answers is None:
        routes = [_direct_response({"path": "/server_info"}, dict(info))]
    else:
        routes = [_direct_response({"path": path}, said) for path, said in answers.items()]
        routes.append({"match": {"path": "/server_info"}, "direct_response": {"status": 404}})
    routes.append(_direct_response({"prefix": "/"}, _ANSWER))
    return typed(
        "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="upstream",
        route_config={"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]},
        http_filters=[
            {
                # An answer before the end of the body would close the connection.
                "name": "envoy.filters.http.buffer",
                "typed_config": typed(
                    "extensions.filters.http.buffer.v3.Buffer",
                    max_request_bytes=_BODY_LIMIT_BYTES,
                ),
            },
            {
                "name": "envoy.filters.http.router",
                "typed_config": typed("extensions.filters.http.router.v3.Router"),
            },
        ],
    )


def _upstream_bootstrap(workers: Mapping[int, ServerInfo], admin_port: int) -> dict[str, Any]:
    return {
        "admin": {"address": socket_address("127.0.0.1", admin_port)},
        "static_resources": {
            "listeners": [
                {
                    "name": f"worker_{port}",
                    "address": socket_address("127.0.0.1", port),
                    "per_connection_buffer_limit_bytes": _BODY_LIMIT_BYTES,
                    "filter_chains": [
                        {
                            "filters": [
                                {
                                    "name": "envoy.filters.network.http_connection_manager",
                                    "typed_config": _manager_of_worker(info),
                                }
                            ]
                        }
                    ],
                }
                for port, info in workers.items()
            ]
        },
    }


def _direct_response(match: dict[str, Any], body: dict[str, Any] | str) -> dict[str, Any]:
    content_type = {"key": "content-type", "value": "application/json"}
    text = body if isinstance(body, str) else json.dumps(body)
    return {
        "match": match,
        "direct_response": {"status": 200, "body": {"inline_string": text}},
        "response_headers_to_add": [{"header": content_type, "append_action": _HEADER_MUTATION}],
    }
