"""Who may ask."""

from collections.abc import Iterable
from hashlib import sha256
from hmac import compare_digest

from raydmd.serving.http.errors import ApiError


class Keys:
    """The API keys that are let in; with none, everybody is.

    Open to all are the page, ``/health``, ``/metrics`` (counts and times alone: no prompt, no key), and pictures
    under ``/v1/files/``, whose names cannot be guessed, so that a browser can show them.
    """

    OPEN = frozenset({"/", "/health", "/metrics"})
    OPEN_BELOW = "/v1/files/"

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [sha256(key.encode()).digest() for key in keys]

    def owner(self, path: str, authorization: bytes) -> str:
        """Return whose request it is: a name that tells keys apart and does not tell the key.

        Args:
            path: of the request.
            authorization: the header, empty if there is none.

        Raises:
            ApiError: 401.
        """
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
