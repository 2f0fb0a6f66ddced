"""Ports of loopback for servers that a test starts."""

import socket


def free_ports(count: int) -> list[int]:
    """Return ports of loopback that nobody listens at now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
