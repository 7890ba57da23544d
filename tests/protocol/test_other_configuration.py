"""Streams that are open when the configuration changes go on as they began."""

import msgspec

from extproc.config.envoy import EnvoyConfig
from extproc.server.replies import ReplyBuilder

from .exchange import (
    Service,
    kind,
    llm_body,
    request_body,
    request_headers,
    response_headers,
    response_trailers,
    serving,
    set_headers,
    stream,
)


async def test_a_stream_keeps_the_configuration_that_it_began_with() -> None:
    async with serving(Service(["m"], 1)) as service, stream(service) as before:
        streams = service.server.streams
        await before.send(request_headers())
        await before.replies(1)
        other = EnvoyConfig(cluster="others")
        streams.use(
            msgspec.structs.replace(streams.session_context, builder=ReplyBuilder(other, None)),
            service,
            streams.settings,
        )
        await before.send(request_body(llm_body("m")))
        (decided,) = await before.replies(1)
        assert set_headers(decided)["x-extproc-cluster"] == "workers"
        async with stream(service) as after:
            await after.send(request_headers(), request_body(llm_body("m")))
            decided = (await after.replies(2))[1]
            assert set_headers(decided)["x-extproc-cluster"] == "others"
        assert service.in_flight >= 1
        await before.send(response_headers(), response_trailers())
        assert [kind(one) for one in await before.replies(2)] == [
            "response_headers",
            "response_trailers",
        ]
