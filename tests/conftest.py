"""Each test closes what it opens: what it leaves open makes that test fail, not a later one."""

import asyncio
import gc
import inspect
from collections.abc import AsyncIterator, Iterator

import grpc.aio
import pytest
import uvloop
from grpc.aio import init_grpc_aio
from hypothesis import HealthCheck, settings

from tests.leftovers import OpenThings, lost_objects, open_tasks

_BEFORE = pytest.StashKey[OpenThings]()

# How long an example takes says how busy the machine is, and nothing about the code.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


def pytest_itemcollected(item: pytest.Item) -> None:
    if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
        # The first fixture to be set up is the last to end.
        item.fixturenames.insert(0, no_open_tasks.__name__)


def pytest_sessionstart() -> None:
    # uvloop opens a pipe for its first loop and keeps it for the later ones.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.sleep(0))
    # So does gRPC with its first server, until nothing uses it any more: this use never ends.
    init_grpc_aio()
    asyncio.run(_make_grpc_server())


def pytest_collection_finish() -> None:
    # Imported modules stay: the collection after each test need not look at them again.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    item.stash[_BEFORE] = OpenThings.now()
    yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    yield
    left = lost_objects() + item.stash[_BEFORE].left_since()
    if nextitem is None or nextitem.path != item.path:
        gc.freeze()
    _fail_for(left)


@pytest.fixture
async def no_open_tasks() -> AsyncIterator[None]:
    """Ends after the other fixtures, while the event loop of the test still runs."""
    yield
    _fail_for(await open_tasks())


async def _make_grpc_server() -> None:
    grpc.aio.server()


def _fail_for(left: list[str]) -> None:
    if left:
        pytest.fail("\n  ".join(["this test leaves open:", *left]), pytrace=False)
