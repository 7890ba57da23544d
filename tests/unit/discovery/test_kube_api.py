"""The API server's wire: bytes as it sends them, and what a failure of each kind is called."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from lightkube.resources.discovery_v1 import EndpointSlice

from extproc.discovery.kube_api import (
    ApiTroubleError,
    KubeApi,
    WatchEndedError,
    WatchEvent,
    WatchLimits,
    open_client,
)
from extproc.errors import ConfigError

from .fake_cluster import write_kubeconfig
from .slices import endpoint, slice_json

Answer = Callable[[httpx2.Request], httpx2.Response]


class _Body(httpx2.AsyncByteStream):
    """Chunks of a watch; with `open` it stays open after them."""

    def __init__(self, *chunks: bytes, stays_open: bool = False) -> None:
        self._chunks = chunks
        self._stays_open = stays_open

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self._chunks:
            yield chunk
        if self._stays_open:
            await asyncio.get_running_loop().create_future()


class _Server(httpx2.AsyncBaseTransport):
    """Answers one request after the other; `requests` are those so far."""

    def __init__(self, *answers: httpx2.Response | Exception) -> None:
        self._answers = list(answers)
        self.requests: list[httpx2.Request] = []
        self.tokens: list[str] = []

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        self.tokens.append(request.headers["authorization"])
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def api(folder: Path, server: _Server, **settings: Any) -> KubeApi[EndpointSlice]:
    client = open_client(settings.pop("kubeconfig", None) or write_kubeconfig(folder), server)
    return KubeApi(client, EndpointSlice, **{"namespace": "ns"} | settings)


def listing(
    *items: dict[str, Any], more: str | None = None, version: str = "41"
) -> httpx2.Response:
    metadata = {"resourceVersion": version} | ({"continue": more} if more else {})
    return httpx2.Response(
        200, json={"kind": "EndpointSliceList", "metadata": metadata, "items": items}
    )


def line(kind: str, body: dict[str, Any]) -> bytes:
    return json.dumps({"type": kind, "object": body}).encode() + b"\n"


def status(code: int, reason: str = "", **headers: str) -> httpx2.Response:
    body = {"kind": "Status", "status": "Failure", "message": "m", "reason": reason, "code": code}
    return httpx2.Response(code, json=body, headers=headers)


async def watched(
    folder: Path, server: _Server, count: int, **settings: Any
) -> list[WatchEvent[EndpointSlice]]:
    """The first events of a watch."""
    events = api(folder, server, **settings).watch("41")
    try:
        return [await anext(events) for _ in range(count)]
    finally:
        await events.aclose()


async def test_a_list_is_read_in_pages_with_its_selector_and_token(tmp_path: Path) -> None:
    empty = slice_json(name="two", endpoints=None, ports=None)
    server = _Server(listing(slice_json(endpoint()), more="next"), listing(empty, version="43"))
    objects, version = await api(tmp_path, server, selector="a=b,c in (d)").list()
    assert [one.metadata and one.metadata.name for one in objects] == ["slice-1", "two"]
    assert (objects[1].endpoints, objects[1].ports, version) == (None, None, "43")
    first, second = server.requests
    assert first.url.path == "/apis/discovery.k8s.io/v1/namespaces/ns/endpointslices"
    assert first.url.params["labelSelector"] == "a=b,c in (d)"
    assert first.headers["authorization"] == "Bearer t"
    assert second.url.params["continue"] == "next"
    assert first.url.params["limit"] == "20"


async def test_an_empty_namespace_means_all(tmp_path: Path) -> None:
    server = _Server(listing())
    assert await api(tmp_path, server, namespace="").list() == ([], "41")
    assert server.requests[0].url.path == "/apis/discovery.k8s.io/v1/endpointslices"
    assert "labelSelector" not in server.requests[0].url.params


async def test_a_watch_gives_events_that_are_split_over_chunks_and_bookmarks(
    tmp_path: Path,
) -> None:
    bookmark = {
        "kind": "EndpointSlice",
        "apiVersion": "discovery.k8s.io/v1",
        "metadata": {"resourceVersion": "99", "creationTimestamp": None},
        "addressType": "",
        "endpoints": None,
        "ports": None,
    }
    added = line("ADDED", slice_json(endpoint()))
    body = _Body(added[:70], added[70:], line("BOOKMARK", bookmark), stays_open=True)
    server = _Server(httpx2.Response(200, stream=body))
    events = await watched(tmp_path, server, 2)
    assert [event.type for event in events] == ["ADDED", "BOOKMARK"]
    parameters = server.requests[0].url.params
    assert parameters["watch"] == parameters["allowWatchBookmarks"] == "true"
    assert (parameters["resourceVersion"], parameters["timeoutSeconds"]) == ("41", "270")


async def test_the_end_of_a_watch_is_reported_and_not_followed_by_another(tmp_path: Path) -> None:
    server = _Server(httpx2.Response(200, stream=_Body(line("ADDED", slice_json()))))
    with pytest.raises(WatchEndedError):
        await watched(tmp_path, server, 2)
    assert len(server.requests) == 1


async def test_a_version_that_is_too_old_is_an_event_within_a_good_answer(tmp_path: Path) -> None:
    error = {"kind": "Status", "reason": "Expired", "code": 410, "message": "too old"}
    server = _Server(httpx2.Response(200, stream=_Body(line("ERROR", error), stays_open=True)))
    with pytest.raises(ApiTroubleError) as caught:
        await watched(tmp_path, server, 1)
    assert caught.value.reason == "expired"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (status(401), "unauthorized"),
        (status(403, "Forbidden"), "forbidden"),
        (status(410, "Expired"), "expired"),
        (status(429), "throttled"),
        (status(500), "server_error"),
        (status(404), "refused"),
        (httpx2.Response(502, text="<html>"), "server_error"),
        (httpx2.Response(403), "forbidden"),
        (httpx2.Response(503, json=["not a status"]), "server_error"),
        (httpx2.Response(200, text="<html>"), "invalid"),
        (httpx2.Response(200, json={"items": [{"addressType": 7}]}), "invalid"),
        (httpx2.Response(200, json=None), "invalid"),
        (httpx2.ConnectError("refused"), "unreachable"),
        (httpx2.ReadError("reset"), "unreachable"),
        (httpx2.RemoteProtocolError("no HTTP"), "unreachable"),
        (httpx2.ConnectTimeout("slow"), "timeout"),
        (httpx2.ReadTimeout("slow"), "timeout"),
    ],
)
@pytest.mark.parametrize("call", ["list", "watch"])
async def test_each_failure_has_one_of_a_few_reasons(
    tmp_path: Path, answer: httpx2.Response | Exception, reason: str, call: str
) -> None:
    # A refused token is read again and tried once more.
    server = _Server(answer, answer)
    asking = api(tmp_path, server).list() if call == "list" else watched(tmp_path, server, 1)
    with pytest.raises(ApiTroubleError) as caught:
        await asking
    assert caught.value.reason == reason
    assert len(str(caught.value)) < 300


async def test_the_servers_wish_to_wait_is_passed_on(tmp_path: Path) -> None:
    for text, seconds in (("7", 7.0), ("soon", 0.0), ("-1", 0.0)):
        with pytest.raises(ApiTroubleError) as caught:
            await api(tmp_path, _Server(status(429, **{"retry-after": text}))).list()
        assert caught.value.retry_after_seconds == seconds


async def test_a_watch_that_is_silent_for_too_long_is_given_up(tmp_path: Path) -> None:
    server = _Server(httpx2.Response(200, stream=_Body(stays_open=True)))
    with pytest.raises(ApiTroubleError) as caught:
        await watched(tmp_path, server, 1, limits=WatchLimits(silence_seconds=0.01))
    assert caught.value.reason == "timeout"


async def test_a_watch_that_the_server_does_not_end_is_ended_here(tmp_path: Path) -> None:
    events = [line("MODIFIED", slice_json())] * 3
    server = _Server(httpx2.Response(200, stream=_Body(*events, stays_open=True)))
    with pytest.raises(ApiTroubleError) as caught:
        await watched(tmp_path, server, 4, limits=WatchLimits(seconds=0, grace_seconds=0.05))
    assert caught.value.reason == "timeout"


async def test_a_rotated_token_is_read_from_its_file(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("old")
    server = _Server(listing(), status(401), listing())
    found = api(tmp_path, server, kubeconfig=write_kubeconfig(tmp_path, tokenFile=str(token)))
    await found.list()
    token.write_text("new")
    await found.list()
    assert server.tokens == ["Bearer old", "Bearer old", "Bearer new"]


async def test_a_token_file_that_vanished_is_a_failure_like_any_other(tmp_path: Path) -> None:
    found = api(
        tmp_path, _Server(), kubeconfig=write_kubeconfig(tmp_path, tokenFile="/no/such/token")
    )
    with pytest.raises(ApiTroubleError):
        await found.list()


@pytest.mark.parametrize(
    "text",
    [None, "", "{", "clusters: []", "current-context: c\nclusters: []\ncontexts: []\n", "[]"],
)
def test_a_kubeconfig_that_cannot_be_used_is_refused_at_the_start(
    tmp_path: Path, text: str | None
) -> None:
    path = tmp_path / "kubeconfig"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match="cannot be used"):
        open_client(str(path))


def test_outside_a_pod_there_is_no_service_account() -> None:
    with pytest.raises(ConfigError, match="set kubeconfig"):
        open_client(None)
