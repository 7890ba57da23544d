"""Ports that a stack holds until it ends."""

import socket

from extproc.testing.stack import free_ports, reserved_port


def test_a_port_is_held_once() -> None:
    (port,) = free_ports(1)
    with reserved_port(port) as first, reserved_port(port) as second:
        assert (first, second) == (True, False)
    with reserved_port(port) as again:
        assert again


def test_a_server_may_listen_on_the_port_that_is_held_for_it() -> None:
    (port,) = free_ports(1)
    with (
        reserved_port(port),
        socket.create_server(("127.0.0.1", port)),
        reserved_port(port) as held,
    ):
        assert not held
