"""How the service is reached: health names, TLS, mutual TLS, Unix socket, addresses in use."""

import asyncio
import socket
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from extproc.config.server import ServerTlsConfig
from extproc.errors import ConfigError
from extproc.server.grpc_server import SERVICE
from tests.protocol.exchange import (
    Service,
    destination,
    llm_body,
    request_body,
    request_headers,
    serving,
    stream,
)

SERVING, NOT_SERVING = 1, 2
ALIVE, READY = ["", "liveness"], ["readiness", SERVICE]


async def health(channel: grpc.aio.Channel, name: str) -> int:
    check: Any = health_pb2_grpc.HealthStub(channel).Check
    async with asyncio.timeout(10):
        answer = await check(health_pb2.HealthCheckRequest(service=name))
    return int(answer.status)


async def stop_unstarted(service: Service) -> None:
    """gRPC frees the addresses of a server only if it was started."""
    await service.server.start()
    await service.server.stop()


async def test_health_names_distinguish_alive_ready_and_draining() -> None:
    async with (
        serving(Service(["m"], 1)) as service,
        grpc.aio.insecure_channel(service.target) as channel,
    ):
        assert [await health(channel, name) for name in ALIVE] == [SERVING] * 2
        assert [await health(channel, name) for name in READY] == [NOT_SERVING] * 2
        await service.server.set_health(ready=True)
        assert [await health(channel, name) for name in READY] == [SERVING] * 2
        await service.server.drain(0)
        await service.server.set_health(ready=True)
        assert [await health(channel, name) for name in ALIVE + READY] == [NOT_SERVING] * 4
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await health(channel, "nothing")
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


async def test_requests_are_refused_until_the_workers_are_known() -> None:
    service = Service(["m"], 1)
    service.server.bind()
    await service.server.start(alive=False)
    try:
        async with grpc.aio.insecure_channel(service.target) as channel:
            assert [await health(channel, name) for name in ALIVE + READY] == [NOT_SERVING] * 4
        async with stream(service) as envoy:
            assert await envoy.ended() is grpc.StatusCode.UNAVAILABLE
        await service.server.set_health(ready=False)
        async with stream(service) as envoy:
            await envoy.send(request_headers(), request_body(llm_body()))
            assert destination((await envoy.replies(2))[1])
    finally:
        await service.server.stop()
        await service.close()


async def test_a_unix_socket_is_served_and_a_stale_one_replaced(tmp_path: Path) -> None:
    path = tmp_path / "extproc.sock"
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(path))
    service = Service(["m"], 1, server={"unix_socket": str(path)})
    async with serving(service), grpc.aio.insecure_channel(f"unix:{path}") as channel:
        assert await health(channel, "") == SERVING
        # TCP as well.
        async with stream(service) as envoy:
            await envoy.send(request_headers(), request_body(llm_body()))
            assert destination((await envoy.replies(2))[1])
    assert not path.exists()


async def test_a_port_in_use_names_its_key() -> None:
    async with serving(Service(["m"], 1)) as service:
        second = Service(["m"], 1)
        second.config = service.config
        second.server._config = service.config
        with pytest.raises(ConfigError, match=r"server\.port"):
            second.server.bind()
        await stop_unstarted(second)


@pytest.mark.parametrize("mutual", [False, True])
async def test_tls_and_mutual_tls(tmp_path: Path, mutual: bool) -> None:
    authority = trustme.CA()
    for name, certificate in (
        ("server", authority.issue_cert("localhost", "127.0.0.1")),
        ("client", authority.issue_cert("envoy")),
    ):
        certificate.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        certificate.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    tls = ServerTlsConfig(
        cert_file=str(tmp_path / "server.pem"),
        key_file=str(tmp_path / "server.key"),
        client_ca_file=str(tmp_path / "ca.pem") if mutual else None,
    )

    def read(name: str) -> bytes:
        return (tmp_path / name).read_bytes()

    plain = grpc.ssl_channel_credentials(root_certificates=read("ca.pem"))
    shown = grpc.ssl_channel_credentials(read("ca.pem"), read("client.key"), read("client.pem"))
    async with serving(Service(["m"], 1, server={"tls": tls})) as service:
        async with grpc.aio.secure_channel(service.target, shown) as channel:
            assert await health(channel, "") == SERVING
        async with grpc.aio.secure_channel(service.target, plain) as channel:
            if mutual:
                with pytest.raises(grpc.aio.AioRpcError):
                    await health(channel, "")
            else:
                assert await health(channel, "") == SERVING
        async with grpc.aio.insecure_channel(service.target) as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await health(channel, "")


async def test_a_file_of_another_program_at_the_socket_path_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "extproc.sock"
    path.write_text("precious")
    service = Service(["m"], 1, server={"unix_socket": str(path)})
    with pytest.raises(ConfigError, match=r"server\.unix_socket: .* is not a socket"):
        service.server.bind()
    await stop_unstarted(service)
    assert path.read_text() == "precious"


async def test_a_socket_of_a_running_process_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "extproc.sock"
    first = Service(["m"], 1, server={"unix_socket": str(path)})
    second = Service(["m"], 1, server={"unix_socket": str(path)})
    async with serving(first):
        with pytest.raises(ConfigError, match="another process listens"):
            second.server.bind()
        await stop_unstarted(second)
        async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
            assert await health(channel, "") == SERVING


async def test_another_certificate_is_shown_to_new_connections(tmp_path: Path) -> None:
    authorities = [trustme.CA(), trustme.CA()]

    def issue(authority: trustme.CA) -> grpc.ChannelCredentials:
        certificate = authority.issue_cert("127.0.0.1")
        certificate.private_key_pem.write_to_path(tmp_path / "tls.key")
        certificate.cert_chain_pems[0].write_to_path(tmp_path / "tls.pem")
        return grpc.ssl_channel_credentials(authority.cert_pem.bytes())

    tls = ServerTlsConfig(cert_file=str(tmp_path / "tls.pem"), key_file=str(tmp_path / "tls.key"))
    trusts_first = issue(authorities[0])
    async with serving(Service(["m"], 1, server={"tls": tls})) as service:
        certificates = service.server.certificates
        assert certificates is not None
        async with grpc.aio.secure_channel(service.target, trusts_first) as open_before:
            assert await health(open_before, "") == SERVING
            trusts_second = issue(authorities[1])
            certificates.use(certificates.read(tls))
            async with grpc.aio.secure_channel(service.target, trusts_second) as channel:
                assert await health(channel, "") == SERVING
            async with grpc.aio.secure_channel(service.target, trusts_first) as channel:
                with pytest.raises(grpc.aio.AioRpcError):
                    await health(channel, "")
            # The connection from before goes on.
            assert await health(open_before, "") == SERVING
