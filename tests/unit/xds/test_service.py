"""The service on a real connection: what a client sees of the workers, and what operators see."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from extproc._protos import llm_extproc_pb2 as pb
from extproc.clock import SystemClock
from extproc.config.loading import parse_config
from extproc.metrics.service import Metrics
from extproc.testing.stack import wait_until
from extproc.workers.registry import WorkerRegistry
from extproc.workers.worker import Worker
from extproc.xds.client import CLUSTERS_TYPE, ENDPOINTS_TYPE
from extproc.xds.publisher import Publisher
from extproc.xds.service import SERVICE, DiscoveryService
from extproc.xds.session import NAMES_MAX
from tests.builders import make_worker
from tests.unit.configs import raw_config

CLUSTER = "workers/m/plain"


class Replica:
    """One replica with its gRPC server."""

    def __init__(self) -> None:
        self.named = True
        self.prometheus = CollectorRegistry()
        self.registry = WorkerRegistry()
        raw = raw_config(envoy={"endpoints": "ads", "eds_settle_secs": 0.05})
        self.publisher = Publisher(
            parse_config(raw),
            self.registry,
            SystemClock(),
            Metrics(self.prometheus),
            all_named=lambda: self.named,
        )

    def add(self, url: str) -> Worker:
        worker = make_worker(url)
        self.registry.upsert(worker)
        self.publisher.workers_changed()
        return worker


@contextlib.asynccontextmanager
async def serving(replica: Replica) -> AsyncIterator[grpc.aio.Channel]:
    service = DiscoveryService(replica.publisher)
    # As in the service, whose limit is that of request bodies.
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 64 * 1024**2)])
    server.add_generic_rpc_handlers((service.handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    task = asyncio.create_task(replica.publisher.run())
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        service.close()
        await server.stop(5)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def open_stream(channel: grpc.aio.Channel, method: str) -> Any:
    return channel.stream_stream(f"/{SERVICE}/{method}")()


async def read_delta(stream: Any) -> pb.DeltaDiscoveryResponse:
    return pb.DeltaDiscoveryResponse.FromString(await stream.read())


def first_request(**fields: Any) -> bytes:
    return pb.DeltaDiscoveryRequest(
        node=pb.Node(id="envoy-1"),
        type_url=ENDPOINTS_TYPE,
        resource_names_subscribe=[CLUSTER],
        **fields,
    ).SerializeToString()


def answer(nonce: str, error: str | None = None) -> bytes:
    request = pb.DeltaDiscoveryRequest(type_url=ENDPOINTS_TYPE, response_nonce=nonce)
    if error is not None:
        request.error_detail.message = error
    return request.SerializeToString()


def is_known(replica: Replica, worker: Worker) -> bool:
    return replica.registry.gateway_knows(worker)


async def test_a_worker_waits_for_the_acknowledgement_and_a_rejection_is_shown() -> None:
    replica = Replica()
    async with serving(replica) as channel:
        stream = open_stream(channel, "DeltaAggregatedResources")
        await stream.write(first_request())
        response = await read_delta(stream)
        await stream.write(answer(response.nonce))
        worker = replica.add("http://10.0.0.1:80")
        response = await read_delta(stream)
        assignment = pb.ClusterLoadAssignment.FromString(response.resources[0].resource.value)
        (entry,) = assignment.endpoints[0].lb_endpoints
        assert entry.endpoint.address.socket_address.port_value == 80
        await stream.write(answer(response.nonce, "not good" * 1000))

        async def rejected() -> bool:
            # Only the beginning is kept.
            return [one["rejected"] for one in replica.publisher.show()] == ["not good" * 128]

        await wait_until(rejected, "the rejection is shown")
        assert not is_known(replica, worker)
        assert replica.prometheus.get_sample_value("extproc_xds_rejections_total") == 1
        other = replica.add("http://10.0.0.2:80")
        response = await read_delta(stream)
        await stream.write(answer(response.nonce))

        async def known() -> bool:
            return is_known(replica, worker) and is_known(replica, other)

        await wait_until(known, "both workers may be chosen")
        (shown,) = replica.publisher.show()
        assert (shown["node"], shown["rejections"], shown["rejected"]) == ("envoy-1", 1, None)
        assert shown["acknowledged"] == {CLUSTER: response.resources[0].version}


async def test_an_envoy_that_changes_the_replica_is_sent_nothing_again() -> None:
    first, second = Replica(), Replica()
    for replica in (first, second):
        replica.add("http://10.0.0.1:80")
    async with serving(first) as channel:
        stream = open_stream(channel, "DeltaAggregatedResources")
        await stream.write(first_request())
        known = {CLUSTER: (await read_delta(stream)).resources[0].version}
    async with serving(second) as channel:
        stream = open_stream(channel, "DeltaAggregatedResources")
        await stream.write(first_request(initial_resource_versions=known))

        async def has_all() -> bool:
            return [one["acknowledged"] for one in second.publisher.show()] == [known]

        await wait_until(has_all, "the replica knows what the Envoy has")
        # What is sent next is the next change.
        second.add("http://10.0.0.2:80")
        response = await read_delta(stream)
        assert response.nonce == "1"


async def test_state_of_the_world_waits_until_all_workers_are_named() -> None:
    replica = Replica()
    replica.named = False
    worker = replica.add("http://10.0.0.1:80")
    async with serving(replica) as channel:
        stream = open_stream(channel, "StreamAggregatedResources")
        request = pb.DiscoveryRequest(type_url=ENDPOINTS_TYPE, resource_names=[CLUSTER])
        other = pb.DiscoveryRequest(type_url="other")
        await stream.write(other.SerializeToString())
        await stream.write(request.SerializeToString())

        async def connected() -> bool:
            return bool(replica.publisher.show())

        await wait_until(connected, "the stream is open")
        assert replica.publisher.snapshot is None
        replica.named = True
        replica.publisher.workers_changed()
        response = pb.DiscoveryResponse.FromString(await stream.read())
        assert not is_known(replica, worker)
        request.response_nonce = response.nonce
        await stream.write(request.SerializeToString())

        async def known() -> bool:
            return is_known(replica, worker)

        await wait_until(known, "the worker may be chosen")


async def test_a_draining_worker_is_marked() -> None:
    replica = Replica()
    worker = replica.add("http://10.0.0.1:80")
    replica.add("http://10.0.0.2:80")
    replica.registry.set_draining(worker, True)
    async with serving(replica) as channel:
        stream = open_stream(channel, "DeltaAggregatedResources")
        await stream.write(first_request())
        response = await read_delta(stream)
        assignment = pb.ClusterLoadAssignment.FromString(response.resources[0].resource.value)
        states = [one.health_status for one in assignment.endpoints[0].lb_endpoints]
        assert states == [pb.HealthStatus.DRAINING, pb.HealthStatus.UNKNOWN]


async def test_a_worker_that_left_is_draining_for_a_moment() -> None:
    """Another replica may still choose it."""
    replica = Replica()
    worker = replica.add("http://10.0.0.1:80")
    async with serving(replica) as channel:
        stream = open_stream(channel, "DeltaAggregatedResources")
        await stream.write(first_request())
        await stream.write(answer((await read_delta(stream)).nonce))
        replica.registry.remove(worker.id)
        replica.publisher.workers_changed()
        seen = []
        for _ in range(2):
            response = await read_delta(stream)
            assignment = pb.ClusterLoadAssignment.FromString(response.resources[0].resource.value)
            seen.append([one.health_status for one in assignment.endpoints[0].lb_endpoints])
            await stream.write(answer(response.nonce))
        assert seen == [[pb.HealthStatus.DRAINING], []]


@pytest.mark.parametrize("method", ["DeltaAggregatedResources", "StreamAggregatedResources"])
async def test_bytes_that_do_not_parse_end_only_their_stream(method: str) -> None:
    replica = Replica()
    async with serving(replica) as channel:
        stream = open_stream(channel, method)
        await stream.write(b"\xff\xff")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert replica.publisher.show() == []


class AbortedError(Exception):
    """What a context of gRPC raises in `abort`."""


class DeafContext:
    """A client that sends all it has and never reads."""

    def __init__(self, requests: list[bytes]) -> None:
        self.requests = requests
        self.aborted: tuple[grpc.StatusCode, str] | None = None

    def peer(self) -> str:
        return "deaf"

    async def read(self) -> Any:
        await asyncio.sleep(0)
        if self.requests:
            return self.requests.pop(0)
        return await asyncio.Event().wait()

    async def write(self, _: bytes) -> None:
        await asyncio.Event().wait()

    async def abort(self, code: grpc.StatusCode, text: str) -> None:
        self.aborted = (code, text)
        raise AbortedError


class SlowContext(DeafContext):
    """A client whose responses take a while; no status can be sent beside one, as with gRPC."""

    def __init__(self, requests: list[bytes]) -> None:
        super().__init__(requests)
        self.writing = False
        self.begun = asyncio.Event()

    async def read(self) -> Any:
        if len(self.requests) == 1:
            await self.begun.wait()
        return await super().read()

    async def write(self, _: bytes) -> None:
        self.writing = True
        self.begun.set()
        await asyncio.shield(self._written())

    async def _written(self) -> None:
        await asyncio.sleep(0.05)
        self.writing = False

    async def abort(self, code: grpc.StatusCode, text: str) -> None:
        assert not self.writing, "a status beside a response"
        await super().abort(code, text)


async def wait_until_refused(replica: Replica, stream: Any, others: int = 0) -> str:
    """Read until the service ends the stream since it is over a limit; returns the reason."""

    async def read_all() -> None:
        while await stream.read() is not grpc.aio.EOF:
            pass

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(read_all(), 10)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(replica.publisher.show()) == others
    assert replica.prometheus.get_sample_value("extproc_xds_streams_refused_total") == 1
    return str(caught.value.details())


NAMES = [str(number) for number in range(NAMES_MAX + 1)]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"resource_names_subscribe": NAMES}, "a request names more than 4096"),
        ({"resource_names_unsubscribe": NAMES}, "a request names more than 4096"),
        ({"initial_resource_versions": dict.fromkeys(NAMES, "1")}, "a request names more"),
        ({"resource_names_subscribe": ["n" * 1025]}, "a name has more than 1024"),
        ({"initial_resource_versions": {"n": "v" * 1025}}, "a name has more than 1024"),
        ({"response_nonce": "n" * 4 * 1024**2}, "a request has more than 4194304 bytes"),
    ],
)
async def test_a_stream_that_goes_over_a_limit_is_ended_and_counted(
    fields: dict[str, Any], reason: str
) -> None:
    replica = Replica()
    async with serving(replica) as channel:
        other = open_stream(channel, "DeltaAggregatedResources")
        await other.write(first_request())
        await read_delta(other)
        stream = open_stream(channel, "DeltaAggregatedResources")
        request = pb.DeltaDiscoveryRequest(type_url=ENDPOINTS_TYPE, **fields)
        with capture_logs() as logs:
            await stream.write(request.SerializeToString())
            assert (await wait_until_refused(replica, stream, others=1)).startswith(reason)
        refused = [line for line in logs if line["event"] == "envoy_refused"]
        assert [line["reason"].startswith(reason) for line in refused] == [True]


async def test_too_many_names_of_the_state_of_the_world_end_the_stream() -> None:
    replica = Replica()
    async with serving(replica) as channel:
        stream = open_stream(channel, "StreamAggregatedResources")
        request = pb.DiscoveryRequest(type_url=ENDPOINTS_TYPE, resource_names=NAMES)
        await stream.write(request.SerializeToString())
        await wait_until_refused(replica, stream)


async def test_names_of_several_messages_add_up() -> None:
    replica = Replica()
    async with serving(replica) as channel:
        stream = open_stream(channel, "DeltaAggregatedResources")
        for names in (NAMES[:-1], NAMES[-1:]):
            request = pb.DeltaDiscoveryRequest(
                type_url=ENDPOINTS_TYPE, resource_names_subscribe=names
            )
            await stream.write(request.SerializeToString())
        assert "the stream names more than 4096" in await wait_until_refused(replica, stream)


async def test_responses_that_are_acknowledged_but_not_read_end_the_stream() -> None:
    """The nonces can be guessed, and each unknown name makes a response."""
    replica = Replica()
    replica.add("http://10.0.0.1:80")
    service = DiscoveryService(replica.publisher)
    requests = [
        pb.DeltaDiscoveryRequest(
            type_url=ENDPOINTS_TYPE,
            resource_names_subscribe=[f"x{number}"],
            response_nonce=str(number) if number else "",
        ).SerializeToString()
        for number in range(1000)
    ]
    context = DeafContext(requests)
    publisher = asyncio.create_task(replica.publisher.run())
    try:

        async def published() -> bool:
            return replica.publisher.snapshot is not None

        await wait_until(published, "there is something to send")
        with pytest.raises(AbortedError):
            await asyncio.wait_for(service._delta(None, context), 10)
    finally:
        publisher.cancel()
        await asyncio.gather(publisher, return_exceptions=True)
    assert context.aborted == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "responses are acknowledged, but not read",
    )
    assert len(requests) - len(context.requests) < 40


async def test_envoy_gets_a_cluster_and_then_asks_for_its_endpoints() -> None:
    replica = Replica()
    replica.add("http://10.0.0.1:80")
    async with serving(replica) as channel:
        stream = open_stream(channel, "DeltaAggregatedResources")
        await stream.write(pb.DeltaDiscoveryRequest(type_url=CLUSTERS_TYPE).SerializeToString())
        response = await read_delta(stream)
        assert response.type_url == CLUSTERS_TYPE
        (resource,) = response.resources
        assert resource.resource.type_url == CLUSTERS_TYPE
        cluster = pb.Cluster.FromString(resource.resource.value)
        assert resource.name == cluster.name == CLUSTER
        await stream.write(
            pb.DeltaDiscoveryRequest(
                type_url=CLUSTERS_TYPE, response_nonce=response.nonce
            ).SerializeToString()
        )
        await stream.write(first_request())
        response = await read_delta(stream)
        assert response.type_url == response.resources[0].resource.type_url == ENDPOINTS_TYPE

        async def acknowledged() -> bool:
            return [one["clusters"] for one in replica.publisher.show()] == [[CLUSTER]]

        await wait_until(acknowledged, "operators see the cluster")


async def test_a_model_that_a_reload_adds_gets_a_cluster() -> None:
    replica = Replica()
    replica.add("http://10.0.0.1:80")
    async with serving(replica) as channel:
        stream = open_stream(channel, "StreamAggregatedResources")
        await stream.write(pb.DiscoveryRequest(type_url=CLUSTERS_TYPE).SerializeToString())
        seen = []
        for models in (["m", "n"], ["n"]):
            response = pb.DiscoveryResponse.FromString(await stream.read())
            seen.append([pb.Cluster.FromString(one.value).name for one in response.resources])
            acknowledgement = pb.DiscoveryRequest(
                type_url=CLUSTERS_TYPE, response_nonce=response.nonce
            )
            await stream.write(acknowledgement.SerializeToString())
            raw = raw_config(models=[{"id": one} for one in models], envoy={"endpoints": "ads"})
            replica.publisher.use(parse_config(raw))
        response = pb.DiscoveryResponse.FromString(await stream.read())
        seen.append([pb.Cluster.FromString(one.value).name for one in response.resources])
        other = "workers/n/plain"
        assert seen == [[CLUSTER], [CLUSTER, other], [other]]


async def test_a_stream_is_ended_when_its_last_response_is_out() -> None:
    replica = Replica()
    replica.add("http://10.0.0.1:80")
    service = DiscoveryService(replica.publisher)
    requests = [
        pb.DeltaDiscoveryRequest(
            type_url=ENDPOINTS_TYPE, resource_names_subscribe=names
        ).SerializeToString()
        for names in (["x"], NAMES)
    ]
    context = SlowContext(requests)
    publisher = asyncio.create_task(replica.publisher.run())
    try:

        async def published() -> bool:
            return replica.publisher.snapshot is not None

        await wait_until(published, "there is something to send")
        with pytest.raises(AbortedError):
            await asyncio.wait_for(service._delta(None, context), 10)
    finally:
        publisher.cancel()
        await asyncio.gather(publisher, return_exceptions=True)
    assert context.aborted is not None
