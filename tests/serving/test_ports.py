"""Ports that a server holds: nobody else gets them, and what shares them does so on purpose."""

import socket
from contextlib import closing

import pytest
from ports import free_ports

from raydmd.errors import UserError
from raydmd.serving.haproxy import BLOCKS, HeldPorts
from raydmd.serving.ports import hold_port


def listen(port: int, shared: bool) -> socket.socket:
    """Listen as HAProxy does, or as any other program."""
    return socket.create_server(("127.0.0.1", port), reuse_port=shared)


def test_a_race_for_the_port() -> None:
    """Between the command's start and HAProxy's, and while HAProxy is started again, the port is nobody else's."""
    port = free_ports(1)[0]
    with closing(HeldPorts("127.0.0.1", port)):
        with pytest.raises(OSError):
            listen(port, shared=False)
        with pytest.raises(UserError, match=f"--port {port}: cannot listen at 127.0.0.1:{port}"):
            HeldPorts("127.0.0.1", port)
        for _ in range(2):  # HAProxy, twice
            with closing(listen(port, shared=True)) as proxy, closing(socket.create_connection(("127.0.0.1", port))):
                proxy.settimeout(5)
                proxy.accept()[0].close()  # the connection goes to who listens, not to who holds
    listen(port, shared=False).close()


def test_each_server_has_a_block_of_its_own_for_its_replicas() -> None:
    with (
        closing(HeldPorts("127.0.0.1", free_ports(1)[0])) as one,
        closing(HeldPorts("127.0.0.1", free_ports(1)[0])) as another,
    ):
        blocks = [held.block() for held in (one, another)]
        numbers = [set(range(first, last + 1)) for first, last in blocks]
        assert not numbers[0] & numbers[1] and all(len(block) == BLOCKS.step - 1 for block in numbers)
        assert all(first > BLOCKS.start and last < BLOCKS.stop for first, last in blocks)
    with closing(HeldPorts("127.0.0.1", free_ports(1)[0])) as third:
        assert third.block()[0] <= min(blocks)[0]  # that of the first is free again


def test_no_block_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(hold_port("127.0.0.1")) as taken, closing(HeldPorts("127.0.0.1", free_ports(1)[0])) as held:
        port = int(taken.getsockname()[1])
        monkeypatch.setattr("raydmd.serving.haproxy.BLOCKS", range(port, port + 1, 10))
        with pytest.raises(UserError, match="no ports for replicas"):
            held.block()


def test_the_port_of_a_server_that_has_just_ended_is_free() -> None:
    """Its connections linger for a minute (TIME_WAIT), on the server's side where that closed first."""
    for shared in (False, True):
        port = free_ports(1)[0]
        with closing(listen(port, shared)) as server, closing(socket.create_connection(("127.0.0.1", port))) as client:
            accepted, _ = server.accept()
            accepted.close()
            assert client.recv(1) == b""
        with closing(HeldPorts("127.0.0.1", port)):
            listen(port, shared=True).close()
