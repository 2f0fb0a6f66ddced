"""JSON with pictures in it, put together from bytes: a JSON encoder would look at each of their millions of letters."""

import json
from base64 import b64encode
from collections.abc import Iterable
from typing import Any


def base64(data: bytes) -> bytes:
    """Return a JSON string: the bytes in Base64."""
    return b'"%s"' % b64encode(data)


def array(values: Iterable[bytes]) -> bytes:
    """Return a JSON array of JSON values."""
    return b"[%s]" % b", ".join(values)


def json_with(fields: dict[str, Any], **more: bytes) -> bytes:
    """Return a JSON object of fields (one at least) and of further ones whose values are JSON already."""
    return b"".join(
        (json.dumps(fields).encode()[:-1], *(b', "%s": %s' % (name.encode(), more[name]) for name in more), b"}")
    )
