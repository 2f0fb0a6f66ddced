"""Ray workers forked from a process that has torch imported: a worker's start is five sixths imports.

Ray's own main runs in the fork, with the environment, the folder, the niceness and the output files that Ray gave the
process that it started, which stays until the worker ends. Ray knows its workers by the process id that they register.
Nothing of Ray is imported before the fork, and no Python thread runs.
"""

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import psutil

MODULES = (
    "numpy", "pandas", "pyarrow.parquet", "pyarrow.dataset", "torch", "diffusers", "transformers", "peft",
    "safetensors.torch", "fastapi", "uvicorn", "PIL.Image", "raydmd.methods.loading",
)  # fmt: skip
CLASSES = (
    "diffusers.WanTransformer3DModel", "diffusers.AutoencoderKLWan", "diffusers.WanPipeline",
    "diffusers.QwenImageTransformer2DModel", "diffusers.AutoencoderKLQwenImage", "diffusers.QwenImagePipeline",
    "diffusers.FlowMatchEulerDiscreteScheduler", "transformers.AutoTokenizer", "transformers.UMT5EncoderModel",
)  # fmt: skip
PRELOADED = Path(__file__).parent / "preloaded"
SOCKET = "RAYDMD_TESTS_WORKER_FORKS"  # the variable that sitecustomize.py reads


@contextmanager
def forked_workers(folder: Path) -> Iterator[None]:
    """Have the Rays that this process starts fork their workers; the socket is in ``folder``."""
    name = folder / "forks"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(name))
        listener.listen(64)
        process = subprocess.Popen(
            [sys.executable, __file__, str(listener.fileno())], pass_fds=[listener.fileno()], start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdin=subprocess.PIPE,
        )  # fmt: skip
    before = {key: os.environ.get(key) for key in (SOCKET, "PYTHONPATH")}
    os.environ[SOCKET] = str(name)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(PRELOADED), before["PYTHONPATH"])))
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})
        process.kill()
        process.wait()


def descendants(process: psutil.Process) -> list[psutil.Process]:
    """Return all below a process: what it has started, and so on. A forked worker is below the one who asked for it."""
    found = process.children(recursive=True)
    if folder := os.environ.get(SOCKET):
        for asked in [Path(folder).with_name(str(child.pid)) for child in found]:
            with suppress(FileNotFoundError, psutil.NoSuchProcess):
                fork = psutil.Process(int(asked.read_text()))
                found += [fork, *fork.children(recursive=True)]
    return found


def _serve(listener: socket.socket) -> None:
    """Fork a process for each start that is asked for, until the tests that started this are gone."""
    for name in MODULES:
        importlib.import_module(name)
    for name in CLASSES:
        module, _, name = name.rpartition(".")
        getattr(importlib.import_module(module), name)  # diffusers and transformers import a class' module then
    assert "ray" not in sys.modules and threading.active_count() == 1
    gc.collect()
    gc.freeze()
    workers: dict[int, tuple[int, socket.socket]] = {}  # by the file of the process: its id, and who asked for it
    events = select.poll()
    events.register(listener, select.POLLIN)
    events.register(sys.stdin, 0)  # its end only
    while True:
        for file, _ in events.poll():
            if file == sys.stdin.fileno():
                return
            if file == listener.fileno():
                connection, _ = listener.accept()
                if (number := os.fork()) == 0:
                    _become_worker(connection, [listener, *(other for _, other in workers.values())])
                workers[os.pidfd_open(number)] = number, connection
                events.register(list(workers)[-1], select.POLLIN)
                events.register(connection, select.POLLRDHUP)
            elif file in workers:
                number, connection = workers.pop(file)
                events.unregister(file)
                events.unregister(connection)
                os.waitpid(number, 0)
                os.close(file)
                connection.close()
            else:  # a worker whose parent is gone
                for number, connection in workers.values():
                    if connection.fileno() == file:
                        os.kill(number, signal.SIGKILL)


def _become_worker(connection: socket.socket, others: list[socket.socket]) -> NoReturn:
    """Run what the connection asks for."""
    for other in others:
        other.close()
    os.setpgid(0, 0)  # as Ray has it: what is left of a dead worker's group is ended
    size, files, _, _ = socket.recv_fds(connection, 4, 3)
    start = json.loads(connection.recv(int.from_bytes(size), socket.MSG_WAITALL))
    connection.close()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    (worker := Path(start["asked"])).with_suffix(".part").write_text(str(os.getpid()))
    worker.with_suffix(".part").rename(worker)
    os.environ.clear()
    os.environ.update(start["environment"])
    os.chdir(start["folder"])
    os.setpriority(os.PRIO_PROCESS, 0, start["niceness"])
    script = start["arguments"][0]
    sys.argv[:], sys.path[:] = start["arguments"], [os.path.dirname(script), *start["path"]]
    runpy.run_path(script, run_name="__main__")
    sys.exit()


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2])
    _serve(socket.socket(fileno=int(sys.argv[1])))
