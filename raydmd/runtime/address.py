"""Whether the cluster that RAY_ADDRESS names can be there at all; told before anything that takes time."""

import os
import socket

from raydmd.errors import UserError
from raydmd.runtime import cluster_address

ANSWER_S = 5.0  # within which a cluster's control store answers when it is asked for the first time


def check_cluster() -> None:
    """Refuse an installed Ray of another version, and a RAY_ADDRESS at which no Ray answers (see `check_reachable`)."""
    from raydmd.runtime.ray_compat import check_version

    check_version()
    if (address := cluster_address()) is not None:
        check_reachable(address)


def check_reachable(address: str) -> None:
    """Refuse an address at which no Ray answers; Ray itself would try for minutes, and then end the process.

    Raises:
        UserError: it is of no such form, no Ray answers there, or one that demands another token.
    """
    from raydmd.runtime.ray_compat import check_token, demands_other_token, gcs_answers, resolved

    if "://" in address:
        raise UserError(
            f"RAY_ADDRESS {address}: a client's address; give HOST:PORT of the cluster's head on a machine of the "
            "cluster, or use `ray job submit`"
        )
    try:
        check_token()
        host, _, port = resolved(address).rpartition(":")
    except Exception as error:  # no token; `auto`, and none runs here
        raise UserError(f"RAY_ADDRESS {address}: {' '.join(str(error).split())[:300]}") from None
    if not host or not port.isdigit():
        raise UserError(f"RAY_ADDRESS {address}: Invalid address format: {address} (HOST:PORT or auto)")
    there = "there" if f"{host}:{port}" == address else f"at {host}:{port}, where Ray looks for it,"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"RAY_ADDRESS {address}: no Ray cluster answers {there} ({error})") from None
    if not gcs_answers(f"{host}:{port}", ANSWER_S):
        raise UserError(f"RAY_ADDRESS {address}: no Ray cluster answers {there} (what listens there is silent)")
    finds_token = address == "auto" and "RAY_AUTH_MODE" not in os.environ  # Ray then looks for one by itself
    if not finds_token and demands_other_token(f"{host}:{port}", ANSWER_S):
        raise UserError(
            f"RAY_ADDRESS {address}: the cluster demands a token that this process does not give: set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token)"
        )
