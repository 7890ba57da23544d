"""Tests with real publishers and sockets what reaches the applier, and when it is cleared."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import uvloop
import zmq
from structlog.testing import capture_logs

from extproc.clock import SystemClock
from extproc.kv.rank_pages import RankPages
from extproc.kv.subscriptions.subscriber import KvSubscriber
from extproc.kv.subscriptions.subscription import (
    EventEndpoint,
    SubscriberSettings,
    SubscriptionState,
)
from tests.unit.kv.publisher import Publisher

_DEFAULTS = SubscriberSettings()
_SOON = SubscriberSettings(replay_timeout_seconds=0.3, replay_cool_down_seconds=60)


class RecordingApplier:
    """Records the batches applied since the last clear, and every call."""

    def __init__(self, dp_rank: int = 0) -> None:
        self.pages = RankPages("http://w:1", dp_rank, 4, bigram=False)
        self.applied: list[bytes] = []
        self.clears: list[str] = []
        self.trust: list[tuple[bool, str]] = []
        self.loads: list[bytes] = []
        self.calls = 0
        self.failures = 0  # of the next calls

    def apply(self, payload: bytes) -> Iterator[None] | None:
        self.calls += 1
        if self.failures:
            self.failures -= 1
            raise ValueError(payload)
        self.applied.append(payload)
        return None

    def clear(self, reason: str) -> None:
        self.calls += 1
        self.applied.clear()
        self.clears.append(reason)

    def set_trusted(self, trusted: bool, reason: str) -> None:
        self.calls += 1
        self.trust.append((trusted, reason))
        self.pages.trusted = trusted

    def on_load(self, payload: bytes) -> None:
        self.calls += 1
        self.loads.append(payload)


@contextlib.asynccontextmanager
async def subscriber(settings: SubscriberSettings = _DEFAULTS) -> AsyncIterator[KvSubscriber]:
    made = KvSubscriber(SystemClock(), settings)
    try:
        yield made
    finally:
        await asyncio.wait_for(made.close(), 10)


def endpoint(publisher: Publisher, *, replay: bool = True, topic: str = "") -> EventEndpoint:
    return EventEndpoint(
        "127.0.0.1",
        publisher.port,
        topic=topic,
        replay_port=publisher.replay_port if replay else None,
    )


async def until(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not come true"
        await asyncio.sleep(0.005)


async def follow(
    made: KvSubscriber, publisher: Publisher, *, replay: bool = True, topic: str = ""
) -> tuple[RecordingApplier, SubscriptionState]:
    """Subscribe, and wait until the first replay has ended."""
    applier = RecordingApplier()
    state = made.add(endpoint(publisher, replay=replay, topic=topic), applier)
    await until(lambda: publisher.subscribed == 1 and applier.pages.trusted)
    return applier, state


@pytest.mark.parametrize("topic_in_replies", [True, False], ids=["with topic", "without"])
async def test_a_late_subscription_gets_the_batches_published_before(
    topic_in_replies: bool,
) -> None:
    async with Publisher(topic_in_replies=topic_in_replies, topic=b"kv") as engine:
        engine.publish(50)
        async with subscriber() as made:
            applier, state = await follow(made, engine, topic="kv")
            engine.publish(5)
            await until(lambda: len(applier.applied) == 55)
            assert applier.applied == engine.payloads()
            assert applier.clears == []
            assert applier.trust[-1] == (True, "complete")
            assert (state.batches, state.replays, state.gaps) == (55, 1, 0)
            assert state.connected
            assert not state.partial
            assert state.bytes == sum(map(len, applier.applied))
            assert state.last_event_at is not None


async def test_a_buffer_without_the_first_batches_gives_a_partial_view() -> None:
    async with Publisher(buffered=10) as engine, subscriber() as made:
        engine.publish(30)
        applier, state = await follow(made, engine)
        assert applier.applied == engine.payloads(start=20)
        assert state.partial
        assert applier.trust[-1] == (True, "partial")
        assert (state.replay_failures, state.gaps) == (0, 0)


async def test_a_subscription_may_start_before_the_engine() -> None:
    async with Publisher() as gone:
        place = gone
    async with subscriber() as made:
        applier = RecordingApplier()
        made.add(endpoint(place), applier)
        await asyncio.sleep(0.3)
        async with place.successor() as engine:
            engine.publish(3)
            await until(lambda: applier.applied == engine.payloads())


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 5), (20, 1), (20, 100)])
async def test_a_restarted_engine_is_followed_from_scratch(before: int, after: int) -> None:
    async with subscriber() as made:
        async with Publisher() as first:
            applier, state = await follow(made, first)
            first.publish(before)
            await until(lambda: len(applier.applied) == before)
        async with first.successor() as second:
            second.publish(after)
            await until(lambda: applier.applied == second.payloads())
            await until(lambda: applier.pages.trusted)
            assert applier.clears == ["restarted"]
            assert state.restarts == 1
            second.publish()
            await until(lambda: applier.applied == second.payloads())


async def test_the_first_event_after_a_reconnect_is_not_lost() -> None:
    """The engine waits for the subscription, then publishes one batch and no more."""
    async with subscriber() as made:
        async with Publisher() as first:
            applier, state = await follow(made, first, replay=False)
        await until(lambda: not state.connected)
        for _ in range(3):
            async with Publisher(port=first.port) as engine:
                await until(lambda: engine.subscribed == 1)
                engine.publish()
                await until(lambda: applier.applied == engine.payloads())


async def test_after_a_reconnect_to_the_same_engine_only_missed_batches_are_requested() -> None:
    async with Publisher() as engine:
        proxy = await TcpProxy.start(engine.port)
        async with subscriber() as made:
            applier = RecordingApplier()
            place = EventEndpoint("127.0.0.1", proxy.port, replay_port=engine.replay_port)
            state = made.add(place, applier)
            engine.publish(10)
            await until(lambda: len(applier.applied) == 10 and applier.pages.trusted)
            proxy.cut()
            await until(lambda: not state.connected)
            assert applier.trust[-1] == (False, "disconnected")
            engine.publish(5)
            await until(lambda: applier.applied == engine.payloads())
            await until(lambda: applier.pages.trusted)
            assert applier.clears == []
            assert engine.requests[-1] == 9
        await proxy.stop()


async def test_a_gap_is_filled_from_the_replay() -> None:
    async with Publisher() as engine, subscriber() as made:
        applier, state = await follow(made, engine)
        engine.publish(3)
        engine.publish(4, lost=True)
        engine.publish(1)
        await until(lambda: applier.applied == engine.payloads())
        await until(lambda: applier.pages.trusted)
        assert (state.gaps, state.replays, applier.clears) == (1, 2, [])
        assert engine.requests == [0, 3]


@pytest.mark.parametrize("replay", [True, False], ids=["out of the buffer", "no replay"])
async def test_a_gap_that_cannot_be_filled_clears(replay: bool) -> None:
    async with Publisher() as engine, subscriber() as made:
        applier, state = await follow(made, engine, replay=replay)
        engine.publish(3)
        await until(lambda: len(applier.applied) == 3)
        engine.publish(4, lost=True, buffered=False)
        engine.publish(2)
        await until(lambda: applier.applied == engine.payloads(start=7))
        await until(lambda: applier.pages.trusted)
        assert applier.clears == ["gap"]
        assert (False, "gap") in applier.trust
        assert state.partial
        assert state.gaps > 0


async def test_a_reconnect_without_replay_clears() -> None:
    async with subscriber() as made:
        async with Publisher() as first:
            applier, _ = await follow(made, first, replay=False)
            first.publish(3)
            await until(lambda: len(applier.applied) == 3)
        async with first.successor() as second:
            await until(lambda: second.subscribed == 1)
            second.publish(3, lost=True)
            second.publish(2)  # 3 would have been the next number of the first engine, too
            await until(lambda: applier.applied == second.payloads(start=3))
            assert applier.clears == ["reconnected"]


async def test_events_during_a_replay_are_applied_once_and_in_order() -> None:
    async with Publisher() as engine, subscriber() as made:
        engine.publish(5000)
        applier = RecordingApplier()
        state = made.add(endpoint(engine), applier)
        while not (applier.pages.trusted and len(applier.applied) >= 5000):
            engine.publish(3)
            await asyncio.sleep(0.001)
        await until(lambda: len(applier.applied) == engine.seq)
        assert applier.applied == engine.payloads()
        assert state.batches == engine.seq


async def test_a_replay_that_lost_batches_is_requested_again() -> None:
    # A replay that lost its end lasts until the time-out, which must outlast a busy moment.
    settings = SubscriberSettings(replay_timeout_seconds=1.5)
    async with Publisher(router_queue=100) as engine, subscriber(settings) as made:
        engine.publish(400)
        applier = RecordingApplier()
        state = made.add(endpoint(engine), applier)
        await until(lambda: applier.applied == engine.payloads(), 60)
        assert applier.clears == []
        assert state.batches == 400
        assert state.replays > 1


async def test_a_replay_without_answer_gives_a_partial_view() -> None:
    async with Publisher(answers=False) as engine, subscriber(_SOON) as made:
        engine.publish(5, lost=True)
        applier = RecordingApplier()
        state = made.add(endpoint(engine), applier)
        await until(lambda: engine.subscribed == 1)
        engine.publish(2)
        await until(lambda: applier.applied == engine.payloads(start=5))
        assert (state.replays, state.replay_failures, state.partial) == (1, 1, True)
        # No replay is requested for a gap so soon after a failed one.
        engine.publish(1, lost=True)
        engine.publish(1)
        await until(lambda: applier.applied == engine.payloads(start=8))
        assert state.replays == 1


async def test_a_failed_replay_is_tried_again_later() -> None:
    settings = SubscriberSettings(replay_timeout_seconds=0.2, replay_cool_down_seconds=0.2)
    async with Publisher(answers=False) as engine, subscriber(settings) as made:
        engine.publish(5, lost=True)
        applier = RecordingApplier()
        state = made.add(endpoint(engine), applier)
        await until(lambda: engine.subscribed == 1)
        engine.publish(2)
        await until(lambda: applier.applied == engine.payloads(start=5))
        engine.answers = True
        await until(lambda: applier.applied == engine.payloads())
        await until(lambda: applier.pages.trusted)
        assert applier.clears == ["rebuilding"]
        assert not state.partial


async def test_a_replay_port_without_a_listener_is_survived() -> None:
    async with Publisher() as gone:
        closed_port = gone.replay_port
    async with Publisher() as engine, subscriber(_SOON) as made:
        applier = RecordingApplier()
        place = EventEndpoint("127.0.0.1", engine.port, replay_port=closed_port)
        with capture_logs() as logs:
            state = made.add(place, applier)
            await until(lambda: engine.subscribed == 1)
            engine.publish(2)
            await until(lambda: applier.applied == engine.payloads())
        assert state.replay_failures == 1
        assert applier.pages.trusted
        (line,) = logs
        assert (line["event"], line["reason"]) == ("kv_replay_failed", "timeout")
        assert (line["worker"], line["rank"]) == ("http://w:1", 0)


async def test_a_flood_does_not_block_the_event_loop() -> None:
    async with Publisher() as engine, subscriber() as made:
        applier, _ = await follow(made, engine)
        worst = 0.0

        async def probe() -> None:
            nonlocal worst
            while True:
                before = time.monotonic()
                await asyncio.sleep(0.005)
                worst = max(worst, time.monotonic() - before - 0.005)

        probing = asyncio.create_task(probe())
        for _ in range(400):
            engine.publish(50)
            await asyncio.sleep(0)
        await until(lambda: len(applier.applied) == 20_000, 10)
        probing.cancel()
        await asyncio.gather(probing, return_exceptions=True)
        assert applier.applied == engine.payloads()
        # Slices take 2 ms; the bound allows for a busy machine.
        assert worst < 0.5


async def test_garbage_is_counted_and_skipped() -> None:
    seq = (0).to_bytes(8, "big")
    async with Publisher(topic=b"kv") as engine, subscriber() as made:
        applier, state = await follow(made, engine, topic="kv")
        for frames in (
            [b"kv"],
            [b"kv", seq],
            [b"kv", b"\x01", b"short number"],
            [b"kv", b"\xff" * 8, b"end marker"],
            [b"kv", seq, b"four", b"frames"],
            [b"kv" + os.urandom(100)],
            [b"kv"] * 5000,
        ):
            engine.send(frames)
        engine.send([b"kv2", seq, b"another topic"])
        engine.publish(2)
        await until(lambda: applier.applied == engine.payloads())
        assert state.malformed == 7
        assert (state.gaps, state.restarts) == (0, 0)


async def test_garbage_in_an_answer_is_counted_and_skipped() -> None:
    seq = (0).to_bytes(8, "big")
    async with Publisher(topic=b"kv") as engine, subscriber() as made:
        engine.publish(3)
        engine.junk = [
            [b""],
            [b"", seq],
            [b"not empty", b"kv", seq, b"x"],
            [b"", b"kv", b"short", b"x"],
            [b"", b"kv", seq, b"x", b"five"],
            [b"", b"kv2", seq, b"another topic"],
        ]
        applier, state = await follow(made, engine, topic="kv")
        assert applier.applied == engine.payloads()
        assert (state.malformed, state.restarts) == (5, 0)


async def test_a_too_large_message_is_refused() -> None:
    async with Publisher() as engine, subscriber() as made:
        applier, state = await follow(made, engine)
        engine.publish(2)
        await until(lambda: len(applier.applied) == 2)
        engine.send([b"", (2).to_bytes(8, "big"), bytes(40 << 20)])
        await until(lambda: not state.connected)
        engine.publish(2)
        await until(lambda: applier.applied == engine.payloads())
        assert applier.clears == []


async def test_a_random_sequence_number_is_recovered_from() -> None:
    async with Publisher() as engine, subscriber() as made:
        applier, _ = await follow(made, engine)
        engine.publish(2)
        engine.send([b"", (1 << 60).to_bytes(8, "big"), b"x"])
        await until(lambda: b"x" in applier.applied)
        engine.publish(2)
        await until(lambda: applier.applied == engine.payloads())


async def test_errors_of_the_applier_are_counted_and_logged() -> None:
    async with Publisher() as engine, subscriber() as made:
        applier, state = await follow(made, engine, replay=False)
        applier.failures = 3
        with capture_logs() as logs:
            engine.publish(3)
            await until(lambda: state.apply_errors == 3)
        # One log line for all errors, without their texts.
        assert [(line["event"], line.get("error")) for line in logs] == [
            ("kv_events_not_applied", "ValueError"),
            ("kv_cleared", None),
        ]
        assert {(line["worker"], line["rank"]) for line in logs} == {("http://w:1", 0)}
        engine.publish(2)
        await until(lambda: applier.applied == engine.payloads(start=3))
        # They may have removed any of the pages before.
        assert applier.clears == ["unreadable"] * 3
        assert state.partial
        assert applier.pages.trusted


async def test_a_batch_that_cannot_be_applied_is_requested_once_more() -> None:
    async with Publisher() as engine, subscriber() as made:
        applier, state = await follow(made, engine)
        engine.publish(3)
        await until(lambda: len(applier.applied) == 3)
        applier.failures = 1
        engine.publish()
        await until(lambda: applier.applied == engine.payloads() and applier.pages.trusted)
        assert (applier.clears, engine.requests) == ([], [0, 3])
        assert (False, "unreadable") in applier.trust
        # It is not requested again so soon.
        applier.failures = 1
        engine.publish()
        await until(lambda: applier.clears == ["unreadable"])
        assert (engine.requests, applier.pages.trusted, state.partial) == ([0, 3], True, True)


async def test_a_batch_is_applied_step_by_step() -> None:
    """No other call comes between the steps of a batch."""
    calls: list[str] = []

    class Stepping(RecordingApplier):
        def apply(self, payload: bytes) -> Iterator[None]:
            for step in range(500):
                calls.append(f"{payload.decode()} {step}")
                yield

        def clear(self, reason: str) -> None:
            calls.append(reason)

    async with Publisher() as engine, subscriber() as made:
        applier = Stepping()
        made.add(endpoint(engine, replay=False), applier)
        await until(lambda: engine.subscribed == 1 and applier.pages.trusted)
        engine.publish()
        engine.publish(lost=True)
        engine.publish()
        await until(lambda: len(calls) == 1001)
        first, third = engine.payload(0).decode(), engine.payload(2).decode()
        assert calls[:500] == [f"{first} {step}" for step in range(500)]
        assert calls[500] == "gap"
        assert calls[501:] == [f"{third} {step}" for step in range(500)]
        engine.publish()
        await until(lambda: len(calls) > 1001)
        await made.remove(applier)
        count = len(calls)
        await asyncio.sleep(0.02)
        assert len(calls) == count


async def test_load_reports_are_passed_on_during_a_flood_of_events() -> None:
    """An applier that never ends a batch does not delay load reports."""

    class Endless(RecordingApplier):
        def apply(self, payload: bytes) -> Iterator[None]:
            while True:
                yield

    async with Publisher() as engine, Publisher(topic=b"load") as load, subscriber() as made:
        applier = Endless()
        made.add(EventEndpoint("127.0.0.1", engine.port, load_port=load.port), applier)
        await until(lambda: engine.subscribed == 1 and load.subscribed == 1)
        engine.publish()
        load.publish()
        await until(lambda: applier.loads == load.payloads())


@pytest.mark.parametrize("answers", [True, False], ids=["answering", "silent"])
async def test_no_call_is_made_after_a_removal_during_a_replay(answers: bool) -> None:
    async with Publisher(answers=answers) as engine, subscriber() as made:
        engine.publish(9_000)
        applier = RecordingApplier()
        made.add(endpoint(engine), applier)
        await until(lambda: len(applier.applied) > 0 if answers else len(engine.requests) > 0)
        await made.remove(applier)
        calls = applier.calls
        assert calls < 9_000
        engine.publish(10)
        await asyncio.sleep(0.1)
        assert applier.calls == calls
        assert made.states == {}
        # The rank may be followed again.
        engine.answers = True
        again = RecordingApplier()
        made.add(endpoint(engine), again)
        await until(lambda: again.applied == engine.payloads())


async def test_only_the_newest_load_report_counts() -> None:
    async with Publisher() as engine, Publisher(topic=b"load") as load, subscriber() as made:
        applier = RecordingApplier()
        place = EventEndpoint("127.0.0.1", engine.port, load_port=load.port)
        state = made.add(place, applier)
        await until(lambda: load.subscribed == 1)
        load.send([b"load", b"bad"])
        load.publish(30)
        await until(lambda: applier.loads[-1:] == load.payloads(start=29))
        assert state.load_reports <= 30
        assert state.malformed == 1
        assert state.batches == 0


async def test_three_hundred_ranks_are_followed() -> None:
    async with Publisher() as engine, subscriber() as made:
        engine.publish(3)
        appliers = [RecordingApplier(rank) for rank in range(300)]
        for applier in appliers:
            made.add(endpoint(engine), applier)
        await until(lambda: all(applier.pages.trusted for applier in appliers), 10)
        await until(lambda: engine.subscribed == 300)
        engine.publish(3)
        await until(lambda: all(applier.applied == engine.payloads() for applier in appliers))
        assert all(state.replay_failures == 0 for state in made.states.values())


def test_a_restart_is_followed_on_uvloop() -> None:
    async def restart() -> None:
        async with subscriber() as made:
            async with Publisher() as first:
                applier, _ = await follow(made, first)
                first.publish(100)
                await until(lambda: applier.applied == first.payloads())
            async with first.successor() as second:
                second.publish(100)
                await until(lambda: applier.applied == second.payloads())

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(restart())


async def test_a_rank_is_followed_over_ipv6() -> None:
    try:
        engine = Publisher(host="[::1]")
    except zmq.ZMQError:
        pytest.skip("no IPv6 here")
    async with engine, subscriber() as made:
        applier = RecordingApplier()
        made.add(EventEndpoint("::1", engine.port, replay_port=engine.replay_port), applier)
        engine.publish(3)
        await until(lambda: applier.applied == engine.payloads())


async def test_closing_leaves_no_task_and_no_socket() -> None:
    async with Publisher() as engine:
        before = len(asyncio.all_tasks())
        made = KvSubscriber(SystemClock(), _DEFAULTS)
        await follow(made, engine)
        await made.close()
        await made.close()
        assert len(asyncio.all_tasks()) == before
        assert made.states == {}


async def test_an_applier_has_one_subscription() -> None:
    async with Publisher() as engine, subscriber() as made:
        applier, _ = await follow(made, engine)
        with pytest.raises(ValueError, match="already subscribed"):
            made.add(endpoint(engine), applier)
        await made.close()
        with pytest.raises(RuntimeError, match="closed"):
            made.add(endpoint(engine), RecordingApplier())


@pytest.mark.parametrize("port", [0, 65_536])
def test_a_port_out_of_range_is_refused(port: int) -> None:
    with pytest.raises(ValueError, match="not a TCP port"):
        EventEndpoint("h", 5557, replay_port=port)


class TcpProxy:
    """A proxy that cuts connections which both ends take for intact."""

    def __init__(self) -> None:
        self.port = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    @classmethod
    async def start(cls, target_port: int) -> "TcpProxy":
        proxy = cls()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there, back = await asyncio.open_connection("127.0.0.1", target_port)
            proxy._writers |= {writer, back}
            await asyncio.gather(_pipe(reader, back), _pipe(there, writer))

        proxy._server = await asyncio.start_server(serve, "127.0.0.1", 0)
        proxy.port = proxy._server.sockets[0].getsockname()[1]
        return proxy

    def cut(self) -> None:
        for writer in self._writers:
            writer.close()
        self._writers.clear()

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await asyncio.sleep(0.05)


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while chunk := await reader.read(65536):
            writer.write(chunk)
            await writer.drain()
    writer.close()


async def answer_as_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """As an HTTP server that does not understand what ZMQ sends."""
    with contextlib.suppress(ConnectionError):
        await reader.read(100)
        # For libzmq the H announces 72 bytes of a name, and what follows is a message.
        writer.write(b"HTTP/1.1 400 Bad Request\r\n".ljust(73, b"-") + b"\x05\x00oops")
        await writer.drain()
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("replay", [True, False])
async def test_the_port_of_an_http_server_is_neither_connected_nor_trusted(replay: bool) -> None:
    server = await asyncio.start_server(answer_as_http, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with capture_logs() as logs:
        async with server, subscriber(_SOON) as made:
            applier = RecordingApplier()
            place = EventEndpoint("127.0.0.1", port, replay_port=port if replay else None)
            state = made.add(place, applier)
            await until(lambda: state.malformed >= 3)
            assert not state.connected
            assert (True, "partial") not in applier.trust
            assert applier.trust[-1] == (False, "malformed")
    assert [line["event"] for line in logs].count("kv_events_malformed") == 1


@pytest.mark.parametrize("kind", ["frames", "payload"])
async def test_a_stream_of_malformed_messages_is_not_trusted_until_a_batch_is_applied(
    kind: str,
) -> None:
    async with Publisher() as engine, subscriber() as made:
        applier, state = await follow(made, engine, replay=False)
        if kind == "payload":
            applier.failures = 3
            engine.publish(3)
        else:
            for _ in range(3):
                engine.send([b"", b"not a number", b"x"])
        await until(lambda: state.malformed + state.apply_errors >= 3)
        await until(lambda: applier.trust[-1] == (False, "malformed"))
        engine.publish()
        await until(lambda: applier.pages.trusted)
        engine.send([b"one frame"])
        await until(lambda: state.malformed == (1 if kind == "payload" else 4))
        assert applier.pages.trusted  # malformed messages among good ones are only counted
