"""The collective of a trainer group: all-reduces that fail when a peer is gone and can be given up at any moment."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

CONNECT = timedelta(seconds=60)
LONGEST = timedelta(minutes=30)  # a meeting or an all-reduce that was given up ends by this at the latest


# What was given up is kept: gloo's destructor would wait for it, for as long as a stopped peer's connection is open.
LEFT_BEHIND: list[Any] = []


class StepDropped(Exception):
    """The call belongs to a step that was given up: a peer was lost, or the group is being formed anew."""


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


class ProcessGroup:
    """A replica's place in one formation of its group (gloo on CPU, NCCL on GPU).

    A dead peer's closed connection makes every reduction raise at once. Where no connection closes (a peer that is
    alive but will not come, a machine that vanished), ``drop`` does it: the reduction under way is left to itself, on a
    copy of the tensor, and its caller goes on.

    Args:
        gpu: whether tensors are on a GPU.

    Attributes:
        waiting: whether it waits for peers to come or to reduce.
        waited: seconds for which it has.
        last_waited: time.monotonic() when it last did.
    """

    def __init__(self, gpu: bool) -> None:
        self.gpu = gpu
        self.waiting, self.waited, self.last_waited = False, 0.0, 0.0
        self._dropped = False
        self._wake = threading.Event()
        self._group: Any = None

    def join(self, address: tuple[str, int], key: str, rank: int, world: int) -> None:
        """Meet the others; blocks until all have come.

        Args:
            address: the rendezvous' host and port.
            key: names this formation in it.
            rank: this replica's place.
            world: how many replicas there are.

        Raises:
            StepDropped: a peer did not come, or ``drop`` was called meanwhile.
        """
        host, port = address
        if host == "127.0.0.1":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo would listen on the host's own address

        def meet() -> Any:
            store = dist.PrefixStore(key, dist.TCPStore(host, port, timeout=CONNECT, wait_for_workers=False))
            store.set(f"here/{rank}", "")
            store.wait([f"here/{peer}" for peer in range(world)], LONGEST)
            return store

        def connect() -> Any:
            make: Any = dist.ProcessGroupNCCL if self.gpu else dist.ProcessGroupGloo
            group = make(store, rank, world, LONGEST)
            group.allreduce([torch.zeros(1, device="cuda" if self.gpu else "cpu")]).wait()
            return group

        with self._wait():  # a newcomer may have much to take over before it comes
            store = self._until_done_or_dropped(_in_thread(meet))
        self._group = self._until_done_or_dropped(_in_thread(connect))

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum ``tensor`` over replicas, in place."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def max_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Take the element-wise largest over replicas, in place."""
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def drop(self) -> None:
        """Make the reduction under way, and all later ones, raise. Called from another thread."""
        self._dropped = True
        self._wake.set()

    def _reduce(self, tensor: torch.Tensor, op: Any) -> torch.Tensor:
        options = dist.AllreduceOptions()
        options.reduceOp = op
        with self._wait():
            shared = tensor.clone()  # may still be written to after it was given up
            self._until_done_or_dropped(lambda done: _issue(self._group, shared, options, done, self.gpu))
            return tensor.copy_(shared)

    @contextmanager
    def _wait(self) -> Iterator[None]:
        since, self.waiting = time.monotonic(), True
        try:
            yield
        finally:
            self.last_waited = time.monotonic()  # before it is seen to work
            self.waited += self.last_waited - since
            self.waiting = False

    def _until_done_or_dropped(self, begin: Callable[[Callable[[], None]], Callable[[], Any]]) -> Any:
        """Begin something that calls back when it is done; wait for that or for ``drop``; return its result."""
        self._wake.clear()
        if self._dropped:
            raise StepDropped("the group is being formed anew")
        try:
            result = begin(self._wake.set)
            self._wake.wait()
            if self._dropped:
                LEFT_BEHIND.append((self._group, result))
                raise StepDropped("the step was given up while its group reduced")
            return result()
        except RuntimeError as error:
            raise StepDropped(f"a peer of the trainer group is gone: {str(error).splitlines()[0]}") from None


def _in_thread(work: Callable[[], Any]) -> Callable[[Callable[[], None]], Callable[[], Any]]:
    def begin(done: Callable[[], None]) -> Callable[[], Any]:
        answer: list[Any] = []

        def run() -> None:
            try:
                answer.append(work())
            except Exception as error:
                answer.append(error)
            done()

        threading.Thread(target=run, daemon=True).start()

        def result() -> Any:
            if isinstance(answer[0], Exception):
                raise RuntimeError(str(answer[0]))
            return answer[0]

        return result

    return begin


def _issue(group: Any, tensor: torch.Tensor, options: Any, done: Callable[[], None], gpu: bool) -> Callable[[], Any]:
    work = group.allreduce([tensor], options)
    if gpu:  # NCCL's futures are done once the work is queued; its works know when it ended
        threading.Thread(target=_poll, args=(work, done), daemon=True).start()
    else:
        work.get_future().add_done_callback(lambda _: done())
    return work.wait


def _poll(work: Any, done: Callable[[], None]) -> None:
    while not work.is_completed():
        time.sleep(0.0002)
    done()


def listen(host: str) -> socket.socket:
    """Return a socket that listens on a free port of ``host`` only."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((host, 0))
    listener.listen(128)
    return listener


class Rendezvous:
    """Where replicas find each other: a store in the driver, which outlives any of them."""

    def __init__(self, host: str) -> None:
        listener = listen(host)
        self.address = (host, listener.getsockname()[1])
        self._store = dist.TCPStore(
            *self.address, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
