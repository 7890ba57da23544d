"""A real API server for all tests of this folder; `make test-k8s` builds it and runs them."""

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from .cluster import Cluster, Namespace

# Outside of that command there is nothing to test against.
collect_ignore_glob = [] if "KUBERNETES_SERVERS" in os.environ else ["test_*.py"]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with Cluster(Path(os.environ["KUBERNETES_SERVERS"]), folder) as found:
        yield found


@pytest.fixture
async def namespace(cluster: Cluster, tmp_path: Path) -> AsyncIterator[Namespace]:
    """A namespace of its own for each test, with an account that may follow slices and pods."""
    async with Namespace(cluster, tmp_path) as found:
        yield found
