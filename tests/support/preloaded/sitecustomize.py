"""What Python runs before all else: a Ray worker asks for its process at tests/support/worker_forks.py."""

import os
import sys

SOCKET = "RAYDMD_TESTS_WORKER_FORKS"

if (
    os.environ.get(SOCKET)
    and sys.orig_argv[1:2]
    and sys.orig_argv[1].endswith("/ray/_private/workers/default_worker.py")
):
    import json
    import socket

    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[SOCKET])
        start = {
            "arguments": sys.orig_argv[1:], "environment": dict(os.environ), "path": sys.path, "folder": os.getcwd(),
            "niceness": os.getpriority(os.PRIO_PROCESS, 0),
            "asked": os.path.join(os.path.dirname(os.environ[SOCKET]), str(os.getpid())),
        }  # fmt: skip
        socket.send_fds(connection, [len(text := json.dumps(start).encode()).to_bytes(4)], [0, 1, 2])
        connection.sendall(text)
        connection.recv(1)  # comes when the worker ends, or its parent does
    os._exit(0)
