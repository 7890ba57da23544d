"""Bookmarks as the real API server sends them: each kind that is followed can decode its own."""

import ssl

import httpx2
import msgspec
import pytest
from lightkube.core.decoders import decode_watch_event
from lightkube.core.resource import NamespacedResource
from lightkube.resources.discovery_v1 import EndpointSlice

from extproc.discovery.pods import WorkerPod

from .cluster import Namespace


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("apis/discovery.k8s.io/v1/namespaces/{}/endpointslices", EndpointSlice),
        ("api/v1/namespaces/{}/pods", WorkerPod),
    ],
)
async def test_a_bookmark_can_be_decoded(
    namespace: Namespace, path: str, kind: type[NamespacedResource]
) -> None:
    # A watch that begins with what there is has a bookmark after that. Others come once a minute.
    parameters = {
        "watch": "true",
        "allowWatchBookmarks": "true",
        "sendInitialEvents": "true",
        "resourceVersionMatch": "NotOlderThan",
        "timeoutSeconds": "30",
    }
    url = f"{namespace.cluster.url}/{path.format(namespace.name)}"
    tls = ssl.create_default_context(cafile=str(namespace.cluster.ca_file))
    headers = {"authorization": f"Bearer {namespace.token}"}
    async with (
        httpx2.AsyncClient(verify=tls, headers=headers) as client,
        client.stream("GET", url, params=parameters) as answer,
    ):
        assert answer.status_code == 200
        lines = answer.aiter_lines()
        event = decode_watch_event((await anext(lines)).encode())
    assert event.type == "BOOKMARK"
    bookmark = msgspec.json.decode(event.object, type=kind)
    assert getattr(bookmark, "metadata").resourceVersion  # noqa: B009 (not in the base class)
