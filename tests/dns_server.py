"""A small name server on loopback, over UDP and TCP, whose records a test changes."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset

__all__ = ["NameServer", "name_server"]

_UDP_MAX_BYTES: Final = 1232


class NameServer:
    """Answers from `records`: the texts of records, by name without the last dot and by type.

    A CNAME is followed within the records. A name without any record does not exist. `code`, if it
    is set, is the answer to all questions, and while `is_silent` nothing is answered. `asked`
    counts the questions, by name and type; `over_tcp` those over TCP.
    """

    def __init__(self) -> None:
        self.records: dict[str, dict[str, list[str]]] = {}
        self.ttl = 0
        self.code: dns.rcode.Rcode | None = None
        self.is_silent = False
        self.asked: Counter[tuple[str, str]] = Counter()
        self.over_tcp = 0
        self.port = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def answer(self, wire: bytes, max_bytes: int) -> bytes | None:
        """The answer to one question; None for no answer."""
        if self.is_silent:
            return None
        try:
            query = dns.message.from_wire(wire)
        except dns.exception.DNSException:
            return None
        response = dns.message.make_response(query)
        (question,) = query.question
        name = question.name.to_text(omit_final_dot=True).lower()
        kind = dns.rdatatype.to_text(question.rdtype)
        self.asked[name, kind] += 1
        if self.code is not None:
            response.set_rcode(self.code)
        elif name not in self.records:
            response.set_rcode(dns.rcode.NXDOMAIN)
        else:
            self._fill(response, name, kind)
        try:
            return response.to_wire(max_size=max_bytes)
        except dns.exception.TooBig:
            short = dns.message.make_response(query)
            short.flags |= dns.flags.TC
            return short.to_wire()

    def _fill(self, response: dns.message.Message, name: str, kind: str) -> None:
        found = self.records.get(name, {})
        for target in found.get("CNAME", []):
            response.answer.append(dns.rrset.from_text(f"{name}.", self.ttl, "IN", "CNAME", target))
            self._fill(response, target.removesuffix("."), kind)
        if texts := found.get(kind):
            response.answer.append(
                dns.rrset.from_text_list(f"{name}.", self.ttl, "IN", kind, texts)
            )

    async def serve_tcp(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            length = int.from_bytes(await reader.readexactly(2), "big")
            wire = await reader.readexactly(length)
            self.over_tcp += 1
            if (found := self.answer(wire, 65_535)) is not None:
                writer.write(len(found).to_bytes(2, "big") + found)
                await writer.drain()
        writer.close()


class _Udp(asyncio.DatagramProtocol):
    def __init__(self, server: NameServer) -> None:
        self._server = server
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str | Any, int]) -> None:
        if (found := self._server.answer(data, _UDP_MAX_BYTES)) is not None:
            self._transport.sendto(found, addr)


@asynccontextmanager
async def name_server() -> AsyncIterator[NameServer]:
    """A server on a free port of 127.0.0.1."""
    loop, server = asyncio.get_running_loop(), NameServer()
    tcp = await asyncio.start_server(server.serve_tcp, "127.0.0.1", 0)
    server.port = tcp.sockets[0].getsockname()[1]
    udp, _ = await loop.create_datagram_endpoint(
        lambda: _Udp(server), local_addr=("127.0.0.1", server.port)
    )
    try:
        yield server
    finally:
        udp.close()
        tcp.close()
        await tcp.wait_closed()
