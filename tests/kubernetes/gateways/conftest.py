"""Envoy Gateway and our recipe for all tests of this folder, and workers for each of them."""

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.unit.simulator.model_folders import model_folder

from ..cluster import Cluster, Objects
from ..services import make_service
from .fleet import Fleet
from .installation import Installation

_PROGRAM: Final = Path(os.environ.get("ENVOY_GATEWAY", "")) / "envoy-gateway"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of the model, for the service and for the workers."""
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def installed(
    cluster: Cluster, kinds: None, tmp_path_factory: pytest.TempPathFactory, tokenizer: str
) -> Iterator[Installation]:
    model = {"id": "m", "policy": "cache_aware_zmq", "tokenizer_path": tokenizer}
    found = Installation(cluster, _PROGRAM, tmp_path_factory.mktemp("gateway"), model)
    with cluster.slice_controller():
        found.open()
        yield found


@pytest.fixture
async def fleet(cluster: Cluster, installed: Installation, tokenizer: str) -> AsyncIterator[Fleet]:
    """Workers as pods of the Service `workers`; a test starts them, and all leave at its end."""
    objects = Objects(cluster.admin(), "default")
    if "workers" not in installed.api.kubectl("get", "services", "-oname"):
        await make_service(objects, "workers", {"app": "workers"}, app="sglang")
    async with Fleet(installed, objects, tokenizer) as found:
        yield found
    await objects.client.close()
