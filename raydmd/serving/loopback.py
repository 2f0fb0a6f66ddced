"""What a replica of Ray Serve opens on every interface is kept where its node is."""

from typing import Any

import ray


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
