"""The collective of a trainer group: torch.distributed over a store that listens where Ray's node does."""

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist


class Distributed:
    """All-reduces over torch.distributed's default group."""

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum ``tensor`` over replicas, in place."""
        dist.all_reduce(tensor)
        return tensor

    def max_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Take the element-wise largest over replicas, in place."""
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor


class ProcessGroup(Distributed):
    """A trainer group's place in it (gloo on CPU, NCCL on GPU); can be left and taken again at a step's edge."""

    def __init__(self, address: tuple[str, int], listener: socket.socket | None, rank: int, world: int, gpu: bool):
        host, port = address
        if host == "127.0.0.1":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo would listen on the host's own address
        store = dist.TCPStore(
            host,
            port,
            world,
            is_master=listener is not None,
            timeout=timedelta(seconds=60),
            master_listen_fd=listener.detach() if listener is not None else None,
            wait_for_workers=False,
        )
        dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=rank, world_size=world)

    def close(self) -> None:
        """Leave the group."""
        dist.destroy_process_group()


def listen(host: str) -> socket.socket:
    """Return a socket that listens on a free port of ``host`` only."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((host, 0))
    listener.listen(128)
    return listener
