"""The Ray side: roles as actors, a controller that passes references, manifests, placement."""

import os

# A Ray that is started here, and not joined, listens on loopback only: on Linux this variable is the one switch for
# it, and Ray reads it when it is imported.
os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # calls that are dropped after a loss end in errors by design
if "RAY_ADDRESS" not in os.environ:
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
