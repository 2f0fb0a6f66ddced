"""Who may ask."""

import logging
import os
import time
from collections.abc import Iterable
from hashlib import sha256
from hmac import compare_digest

from raydmd.errors import UserError
from raydmd.serving.http.errors import ApiError
from raydmd.serving.settings import Serving, key_digest, read_keys

log = logging.getLogger("raydmd.serving.http")

LOOK_SECONDS = 1.0  # between looks at the file of keys


class Keys:
    """The API keys that are let in; with none, everybody is.

    Open to all are the pages at ``/`` and ``/docs`` (they ask for the key, and have nothing to hide), ``/health``,
    ``/metrics`` (counts and times alone: no prompt, no key), and pictures under ``/v1/files/``, whose names cannot be
    guessed, so that a browser can show them.

    The file of keys is read again when it changes. One that is gone, empty or half written changes nothing: a server
    with keys never opens to everybody.

    Args:
        serving: says where keys are.
        more: further keys.

    Raises:
        UserError: the file of keys is missing or has no key in it.
    """

    OPEN = frozenset({"/", "/docs", "/health", "/metrics"})
    OPEN_BELOW = ("/v1/files/", "/docs/")

    def __init__(self, serving: Serving, more: Iterable[str] = ()) -> None:
        self.serving, self._more = serving, frozenset(key_digest(key) for key in more)
        self._stamp, self._looked = self._file_stamp(), time.monotonic()
        self._digests = self._read()

    def _read(self) -> list[bytes]:
        return [bytes.fromhex(digest) for digest in sorted(read_keys(self.serving) | self._more)]

    def _file_stamp(self) -> tuple[int, ...] | None:
        if self.serving.api_keys_file is None:
            return None
        try:
            found = os.stat(self.serving.api_keys_file)
        except OSError:
            return ()
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _look(self) -> None:
        """Read the file of keys again if it has changed."""
        if self.serving.api_keys_file is None or (now := time.monotonic()) - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        if (stamp := self._file_stamp()) == self._stamp:
            return
        self._stamp = stamp
        try:
            self._digests = self._read()
        except UserError as error:
            log.warning("%s; the keys of before go on", error)
        else:
            log.info("%s has changed: %d API keys are let in", self.serving.api_keys_file, len(self._digests))

    def asked(self) -> bool:
        """Say whether keys are asked for."""
        return bool(self._digests)

    def owner(self, path: str, authorization: bytes) -> str:
        """Return whose request it is: a name that tells keys apart and does not tell the key.

        Args:
            path: of the request.
            authorization: the header, empty if there is none.

        Raises:
            ApiError: 401.
        """
        self._look()
        if not self._digests or path in self.OPEN or path.startswith(self.OPEN_BELOW):
            return ""
        scheme, _, key = authorization.partition(b" ")
        digest = sha256(key.strip()).digest()
        # Every key is compared, in constant time: how long it takes tells nothing of how near a guess is.
        known = sum([compare_digest(digest, other) for other in self._digests])
        if scheme.lower() == b"bearer" and known:
            return digest.hex()[:16]
        what = "wrong API key" if key else "no API key"
        raise ApiError(
            401, f"{what} (header 'Authorization: Bearer KEY')", code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )  # fmt: skip
