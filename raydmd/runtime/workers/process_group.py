"""The collective of a trainer group: all-reduces that fail when a peer is gone and can be given up at any moment."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from raydmd.errors import PortableError

CONNECT = timedelta(seconds=60)
LONGEST = timedelta(minutes=30)  # a meeting or an all-reduce that was given up ends by this at the latest


class Begun(NamedTuple):
    """What is under way: how to take its result, or its error, and how to ask whether it has ended."""

    result: Callable[[], Any]
    ended: Callable[[], bool]


Begin = Callable[[Callable[[], None]], Begun]  # calls its argument once what it began has ended

# What was given up is kept until it has ended, at the latest when its peers' connections are closed: gloo's destructor
# would wait for it.
LEFT_BEHIND: list[tuple[Any, Begun]] = []


class StepDropped(PortableError):
    """The call belongs to a step that was given up: a peer was lost, or the group is being formed anew."""


class ProcessGroup:
    """A replica's place in one generation of its group (gloo on CPU, NCCL on GPU).

    A dead peer's closed connection makes every reduction raise at once. Where no connection closes (a peer that is
    alive but will not come, a machine that vanished), ``drop`` does it: the reduction under way is left to itself, on a
    copy of the tensor, and its caller goes on. NCCL's is aborted, too: its kernel would wait on the GPU for the peer.

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
            key: names this generation in it.
            rank: this replica's place.
            world: how many replicas there are.

        Raises:
            StepDropped: a peer did not come, or ``drop`` was called meanwhile.
        """
        host, port = address

        def meet() -> Any:
            store = dist.PrefixStore(key, dist.TCPStore(host, port, timeout=CONNECT, wait_for_workers=False))
            store.set(f"here/{rank}", "")
            store.wait([f"here/{peer}" for peer in range(world)], LONGEST)
            return store

        def connect() -> Any:
            make = _nccl if self.gpu else _gloo
            self._group = make(store, rank, world, local_address(address))
            self._group.allreduce([torch.zeros(1, device="cuda" if self.gpu else "cpu")]).wait()

        with self._wait():  # a newcomer may have much to take over before it comes
            store = self._until_done_or_dropped(_in_thread(meet))
        self._until_done_or_dropped(_in_thread(connect))

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum ``tensor`` over replicas, in place."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def max_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Take the element-wise largest over replicas, in place."""
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def drop(self) -> None:
        """Make the reduction under way, and all later ones, raise. Called from another thread."""
        self._dropped = True
        try:
            if self.gpu and self._group is not None:
                self._group.abort()
        finally:
            self._wake.set()

    def _reduce(self, tensor: torch.Tensor, op: Any) -> torch.Tensor:
        options = dist.AllreduceOptions()
        options.reduceOp = op
        with self._wait():
            shared = tensor.clone()  # may still be written to after it was given up
            self._until_done_or_dropped(lambda done: self._issue(shared, options, done))
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

    def _issue(self, tensor: torch.Tensor, options: Any, done: Callable[[], None]) -> Begun:
        work = self._group.allreduce([tensor], options)
        if not self.gpu:
            work.get_future().add_done_callback(lambda _: done())
            return Begun(work.wait, work.is_completed)

        def poll() -> None:  # NCCL's futures are done once the work is queued; its works know when it ended
            try:
                while not self._dropped and not work.is_completed():
                    time.sleep(0.0002)
            finally:
                done()

        def result() -> None:
            if (error := work.exception()) is not None:  # wait only queues a wait on the GPU
                raise RuntimeError(str(error))
            work.wait()

        threading.Thread(target=poll, daemon=True).start()
        return Begun(result, work.is_completed)

    def _until_done_or_dropped(self, begin: Begin) -> Any:
        """Begin something that calls back when it is done; wait for that or for ``drop``; return its result."""
        LEFT_BEHIND[:] = [left for left in LEFT_BEHIND if not left[1].ended()]
        self._wake.clear()
        if self._dropped:
            raise StepDropped("the group is being formed anew")
        try:
            begun = begin(self._wake.set)
            self._wake.wait()
            if self._dropped:
                LEFT_BEHIND.append((self._group, begun))
                raise StepDropped("the step was given up while its group reduced")
            return begun.result()
        except RuntimeError as error:
            raise StepDropped(f"a peer of the trainer group is gone: {str(error).splitlines()[0]}") from None


def _gloo(store: Any, rank: int, world: int, host: str) -> Any:
    backend: Any = dist.ProcessGroupGloo
    options = backend._Options()
    options._timeout = LONGEST
    options._devices = [backend.create_device(hostname=host)]  # by itself it takes what the machine's name resolves to
    return backend(store, rank, world, options)


def _nccl(store: Any, rank: int, world: int, host: str) -> Any:
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # torch would end the process at an error
    if host == "127.0.0.1":
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")  # it would listen on the machine's own address
    backend: Any = dist.ProcessGroupNCCL
    return backend(store, rank, world, LONGEST)


def _in_thread(work: Callable[[], Any]) -> Begin:
    def begin(done: Callable[[], None]) -> Begun:
        answer: Future[Any] = Future()

        def run() -> None:
            try:
                answer.set_result(work())
            except Exception as error:
                answer.set_exception(RuntimeError(str(error)))
            done()

        threading.Thread(target=run, daemon=True).start()
        return Begun(answer.result, answer.done)

    return begin


def local_address(peer: tuple[str, int]) -> str:
    """Return the address of this machine that connections to ``peer`` have, loopback for loopback; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(peer)
        return str(probe.getsockname()[0])


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
