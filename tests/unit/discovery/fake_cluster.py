"""An API server without a server: objects by kind, listed and watched at the wire."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
from lightkube.core.async_client import AsyncClient

from extproc.discovery.kube_api import open_client
from extproc.label_selectors import parse_selector

__all__ = ["FakeCluster", "write_kubeconfig"]


def write_kubeconfig(folder: Path, **user: str) -> str:
    """Write a file for the cluster at https://api.test; by default with a token."""
    path = folder / "kubeconfig.yaml"
    path.write_text(
        json.dumps(
            {
                "current-context": "c",
                "clusters": [{"name": "c", "cluster": {"server": "https://api.test"}}],
                "users": [{"name": "u", "user": user or {"token": "t"}}],
                "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            }
        )
    )
    return str(path)


class _Watch(httpx2.AsyncByteStream):
    """Sends lines until there is a `None` instead of one."""

    def __init__(self) -> None:
        self.lines: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (line := await self.lines.get()) is not None:
            yield line


class FakeCluster(httpx2.AsyncBaseTransport):
    """`refuse` is a status with which every further request is answered."""

    def __init__(self) -> None:
        self.refuse: int | None = None
        self._objects: dict[str, dict[str, dict[str, Any]]] = {}
        self._watches: list[tuple[str, httpx2.QueryParams, _Watch]] = []

    def client(self, folder: Path) -> AsyncClient:
        return open_client(write_kubeconfig(folder), self)

    def put(self, plural: str, made: dict[str, Any]) -> None:
        """Create or replace an object; open watches report it."""
        known = self._objects.setdefault(plural, {})
        before = known.get(made["metadata"]["name"])
        known[made["metadata"]["name"]] = made
        for kind, parameters, watch in self._watches:
            if kind != plural:
                continue
            was = before is not None and _matches(before, parameters)
            if _matches(made, parameters):
                watch.lines.put_nowait(_line("MODIFIED" if was else "ADDED", made))
            elif was:
                watch.lines.put_nowait(_line("DELETED", made))

    def delete(self, plural: str, name: str) -> None:
        """Delete an object; open watches report it."""
        gone = self._objects[plural].pop(name)
        for kind, parameters, watch in self._watches:
            if kind == plural and _matches(gone, parameters):
                watch.lines.put_nowait(_line("DELETED", gone))

    def delete_unseen(self, plural: str, name: str) -> None:
        """Delete an object; no watch reports it."""
        del self._objects[plural][name]

    def end_watches(self) -> None:
        for _, _, watch in self._watches:
            watch.lines.put_nowait(None)
        self._watches.clear()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if self.refuse is not None:
            return httpx2.Response(self.refuse, text="no")
        plural = request.url.path.rpartition("/")[2]
        if request.url.params.get("watch") == "true":
            watch = _Watch()
            self._watches.append((plural, request.url.params, watch))
            return httpx2.Response(200, stream=watch)
        objects = self._objects.get(plural, {}).values()
        items = [one for one in objects if _matches(one, request.url.params)]
        return httpx2.Response(200, json={"metadata": {"resourceVersion": "1"}, "items": items})


def _matches(one: dict[str, Any], parameters: httpx2.QueryParams) -> bool:
    metadata = one["metadata"]
    named = parameters.get("fieldSelector", "").removeprefix("metadata.name=")
    selector = parameters.get("labelSelector")
    return named in ("", metadata["name"]) and (
        selector is None or parse_selector(selector).matches(metadata.get("labels"))
    )


def _line(kind: str, one: dict[str, Any]) -> bytes:
    return json.dumps({"type": kind, "object": one}).encode() + b"\n"
