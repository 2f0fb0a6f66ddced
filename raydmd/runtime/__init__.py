"""The Ray side: roles as actors, a controller that passes references, manifests, placement."""

import os


def cluster_address() -> str | None:
    """Return the cluster that RAY_ADDRESS names; None where it is unset, blank or ``local``: one is started here."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return None if address in ("", "local") else address


# A Ray that is started here, and not joined, listens on loopback only: on Linux a variable is the one switch for it,
# and Ray reads it when it is imported.
os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # calls that are dropped after a loss end in errors by design
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # no call starts a Ray by itself, such as one while closing
if cluster_address() is None:
    os.environ.pop("RAY_ADDRESS", None)  # unset for Ray, too, and for whatever is started from here
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
