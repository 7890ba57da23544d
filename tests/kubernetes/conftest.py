"""A real API server for all tests of this folder; `make test-k8s` builds it and runs them."""

import os
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import pytest

from .cluster import Cluster, Namespace
from .kinds import install_kinds

_SERVERS: Final = os.environ.get("KUBERNETES_SERVERS")
_KINDS: Final = Path(os.environ.get("KUBERNETES_KINDS", ""))
# Without that command there is nothing to test against.
collect_ignore_glob = [] if _SERVERS else ["test_*.py"]
# Those tests need a network of their own, in which pods have addresses that are not loopback.
collect_ignore = [] if os.environ.get("ISOLATED") else ["ads", "gateways"]

_CLUSTER = pytest.StashKey[Cluster]()
_FOLDER = pytest.StashKey[TemporaryDirectory[str]]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Before the first test: what a test opens belongs to that test."""
    if _SERVERS and not session.config.option.collectonly:
        folder = session.config.stash[_FOLDER] = TemporaryDirectory(prefix="cluster-")
        cluster = session.config.stash[_CLUSTER] = Cluster(Path(_SERVERS), Path(folder.name))
        cluster.open()


def pytest_unconfigure(config: pytest.Config) -> None:
    if _CLUSTER in config.stash:
        config.stash[_CLUSTER].close()
    if _FOLDER in config.stash:
        config.stash[_FOLDER].cleanup()


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Cluster:
    return request.config.stash[_CLUSTER]


@pytest.fixture(scope="session")
def kinds(cluster: Cluster) -> None:
    """The API server knows the kinds of gateways and operators."""
    install_kinds(cluster, _KINDS)


@pytest.fixture
async def namespace(cluster: Cluster, tmp_path: Path) -> AsyncIterator[Namespace]:
    """A namespace of its own for each test, with an account that may follow slices and pods."""
    async with Namespace(cluster, tmp_path) as found:
        yield found
