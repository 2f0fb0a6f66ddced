"""One driver a folder: a lock that says who holds it, since when, and that it still lives.

``run.lock`` lies in the run's folder and at the root of its checkpoints. It is a JSON record of its owner (a random
token), host and process; its time of modification is the owner's heartbeat, renewed every `BEAT_S` seconds. An owner
is dead when

- it ran on this machine (same boot, same space of process numbers) and no process has its number and time of start, or
- it was a driver of this very process and has ended, on storage that was gone by then, or
- it ran elsewhere and its heartbeat is older than `DEAD_AFTER_S` seconds by the clock of the storage itself.

On a disk the lock is made by a hard link, which one of several starters gets; one at a time takes over a dead owner's.
An object store has nothing like it in pyarrow.fs: a starter writes its record, waits `SETTLE_S` seconds and reads it
back, and the last writer has won. That cannot exclude a second driver whose write was under way for longer than that:
within `BEAT_S` seconds the first one finds the other's name in the lock, and ends. Until then both write whole
checkpoints of the same bits under names of their own step, and neither deletes what the other wrote.
"""

import fcntl
import json
import os
import secrets
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow as pa

from raydmd.atomic import writing
from raydmd.errors import StorageError, UserError
from raydmd.locations import KEY
from raydmd.runtime.checkpoint.storage import Store, one_line

LOCK = "run.lock"
BEAT_S = 10.0
DEAD_AFTER_S = 60.0
SETTLE_S = 2.0
GUARD_S = 5.0  # how long another starter, which holds the folder for milliseconds, is waited for
TRIES = 100
UNREACHABLE = (OSError, pa.ArrowException)

_given_up: set[str] = set()  # tokens of this process's own drivers that have ended, whatever their locks' files say


@dataclass(frozen=True)
class Owner:
    """Who holds a lock.

    Attributes:
        owner: a random token, another one at every start of a driver.
        host: the machine's name, for people.
        machine: the machine's boot and space of process numbers; process numbers mean nothing elsewhere.
        pid: the driver's process.
        started: when that process was started, in the kernel's ticks since boot: numbers are used again.
        since: when it took the lock, in seconds since 1970 by its clock.
    """

    owner: str
    host: str
    machine: str
    pid: int
    started: int
    since: float

    def on_this_machine(self) -> bool:
        """Whether its process number can be looked up here."""
        return self.machine == _machine()

    def runs(self) -> bool:
        """Whether its process, which was one of this machine, is still there."""
        return self.started == _started(self.pid)


class Lock:
    """The lock of one folder.

    Args:
        uri: the folder: a path, file://, s3:// or gs://.
        named: how messages name it, e.g. ``--out runs/digits``.
        owner: the driver's token.
    """

    def __init__(self, uri: str, named: str, owner: str) -> None:
        self.store, self.named, self.owner = Store(uri), named, owner
        self.lost: str | None = None
        self._made: list[Path] = []  # folders that were not there before

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            UserError: another driver holds it, or the folder cannot be reached.
            StorageError: the disk is full or gone.
        """
        try:
            with writing(self.named):
                if self.store.local:
                    self._acquire_on_disk()
                else:
                    self._acquire_object()
        except UNREACHABLE as error:
            self._remove_folders()
            raise UserError(f"{self.named}: it cannot be locked: {one_line(error)}") from None
        except BaseException:
            self._remove_folders()
            raise

    def beat(self) -> None:
        """Show that the owner lives; see in ``lost`` whether another driver has taken the lock.

        Raises:
            OSError: the folder cannot be reached.
        """
        held = self.holder()
        if held is not None and held.owner != self.owner:
            self.lost = f"{self.named}: another driver has taken it over ({_who(held)})"
        elif self.lost is None:
            if not self.store.local:
                self.store.write(LOCK, [self._record()])
            elif held is not None:
                os.utime(self._root / LOCK)
            elif self._root.is_dir():  # somebody removed it
                self._create()

    def release(self) -> None:
        """Give the lock up, if it is still this driver's; one that cannot be removed now counts as a dead owner's."""
        _given_up.add(self.owner)
        with suppress(*UNREACHABLE):
            held = self.holder()
            if held is not None and held.owner == self.owner:
                self.store.delete(LOCK)
            self._remove_folders()

    def holder(self) -> Owner | None:
        """Return who holds the lock; None where there is none.

        Raises:
            OSError: the folder cannot be reached.
        """
        return read_owner(self.store)

    @property
    def _root(self) -> Path:
        return Path(self.store.root)

    def _acquire_on_disk(self) -> None:
        self._make_folder()
        with _one_at_a_time(self._root):
            for _ in range(TRIES):
                if self._create():
                    return
                if (held := self.holder()) is None:
                    continue  # it was given up just now
                if not self._is_dead(held):
                    raise self._refusal(held)
                self._take_away(held)
        raise UserError(f"{self.named}: many drivers are starting on it; choose another place")

    def _create(self) -> bool:
        """Make the lock, whole at once; return False where there is one."""
        part, lock = self._root / f".{LOCK}.{self.owner}.part", self._root / LOCK
        try:
            part.write_bytes(self._record())
            try:
                os.link(part, lock)
            except FileExistsError:
                return False
            except OSError:  # a file system without hard links
                try:
                    with lock.open("xb") as file:
                        file.write(self._record())
                except FileExistsError:
                    return False
            return True
        finally:
            part.unlink(missing_ok=True)

    def _take_away(self, dead: Owner) -> None:
        aside = self._root / f".{LOCK}.{self.owner}.dead.part"
        try:
            (self._root / LOCK).rename(aside)
        except FileNotFoundError:
            return
        try:
            found = _parse(aside.read_bytes())
            if found is not None and found.owner != dead.owner:  # where flock does not reach: another was faster
                with suppress(FileExistsError):
                    os.link(aside, self._root / LOCK)
        finally:
            aside.unlink(missing_ok=True)

    def _acquire_object(self) -> None:
        held = self.holder()
        if held is not None and held.owner != self.owner and not self._is_dead(held):
            raise self._refusal(held)
        self.store.write(LOCK, [self._record()])
        time.sleep(SETTLE_S)
        held = self.holder()
        if held is not None and held.owner != self.owner:
            raise self._refusal(held)

    def _is_dead(self, held: Owner) -> bool:
        if held.owner in _given_up:
            return True
        return not held.runs() if held.on_this_machine() else self._silent_s() > DEAD_AFTER_S

    def _silent_s(self) -> float:
        """Return the seconds since the holder's last heartbeat; both ends are times of the storage's own clock."""
        probe = f".{LOCK}.{self.owner}.now.part"
        self.store.write(probe, [b"now"])
        try:
            now, beat = self.store.modified([probe, LOCK])
        finally:
            self.store.delete(probe)
        return 0.0 if now is None or beat is None else max(0.0, now - beat)

    def _refusal(self, held: Owner) -> UserError:
        hint = "wait for it, end it, or choose another place"
        if not held.on_this_machine():
            left = max(0.0, DEAD_AFTER_S - self._silent_s())
            hint = f"if that one is dead, the same command goes on {left:.0f} s from now"
        return UserError(f"{self.named}: another driver is at work on it ({_who(held)}); {hint}")

    def _record(self) -> bytes:
        pid = os.getpid()
        held = Owner(self.owner, socket.gethostname(), _machine(), pid, _started(pid) or 0, round(time.time(), 3))
        return json.dumps({**asdict(held), "heartbeat_seconds": BEAT_S}, indent=1).encode()

    def _make_folder(self) -> None:
        if self._root.exists() and not self._root.is_dir():
            raise UserError(f"{self.named}: there is a file of that name; a folder is needed")
        missing = [folder for folder in (self._root, *self._root.parents) if not folder.exists()]
        self._root.mkdir(parents=True, exist_ok=True)
        self._made = missing

    def _remove_folders(self) -> None:
        """Remove the folders that were made for the lock, where nothing else came into them."""
        if self.store.local:
            for folder in self._made:
                with suppress(OSError):
                    folder.rmdir()


class Claim:
    """All that one driver holds: a context manager that takes its locks, beats for them, and gives them up.

    Args:
        folders: how messages name each folder, and the folder or URI.
    """

    def __init__(self, folders: Sequence[tuple[str, str]]) -> None:
        self.owner = secrets.token_hex(8)
        self.locks = [Lock(uri, named, self.owner) for named, uri in folders]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)

    def __enter__(self) -> Self:
        """Take all locks, or none.

        Raises:
            UserError: another driver holds one, or a folder cannot be reached.
            StorageError: a disk is full or gone.
        """
        taken: list[Lock] = []
        try:
            for lock in self.locks:
                lock.acquire()
                taken.append(lock)
        except BaseException:
            for lock in reversed(taken):
                lock.release()
            raise
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Give all locks up."""
        self._over.set()
        self._thread.join(BEAT_S)
        for lock in reversed(self.locks):
            lock.release()

    def check(self) -> None:
        """See that no other driver has taken over.

        Raises:
            StorageError: one has: this driver was silent for too long, and must write nothing more.
        """
        for lock in self.locks:
            if lock.lost is not None:
                raise StorageError(lock.lost)

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            for lock in self.locks:
                with suppress(*UNREACHABLE):  # a disk that is full or gone is told of by who has something to write
                    lock.beat()


def claim_run(folder: Path, checkpoints: str) -> Claim:
    """Return the claim on a run's folder and on the place of its checkpoints."""
    return Claim([(f"--out {folder}", str(folder.resolve())), (f"{KEY}: {Store(checkpoints)}", checkpoints)])


def read_owner(store: Store) -> Owner | None:
    """Return who holds a folder's lock; None where there is none.

    Raises:
        OSError: the folder cannot be reached.
    """
    try:
        content = store.read(LOCK)
    except FileNotFoundError:
        return None
    return _parse(content) or Owner("", "an unknown host", "", 0, 0, 0.0)


def _parse(content: bytes) -> Owner | None:
    try:
        tree = json.loads(content)
        kinds: dict[str, Any] = {
            "owner": str,
            "host": str,
            "machine": str,
            "pid": int,
            "started": int,
            "since": (int, float),
        }
        if all(isinstance(tree[name], kind) for name, kind in kinds.items()):
            return Owner(**{name: tree[name] for name in kinds})
    except (ValueError, TypeError, KeyError):
        pass
    return None  # half of a record: its owner died in the moment of writing it


def _who(held: Owner) -> str:
    since = f", since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(held.since))}" if held.since else ""
    return f"process {held.pid} on {held.host}{since}"


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{uuid.getnode():x} {socket.gethostname()}"


def _started(pid: int) -> int | None:
    """Return when a process of this machine was started, in ticks since boot; None where it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:  # a system without /proc: the number alone must do
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return 0


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Keep other starters of this machine out; where the file system cannot, or one is stuck, go on without."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        end = time.monotonic() + GUARD_S
        while time.monotonic() < end:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
                break
        yield
    finally:
        os.close(descriptor)
