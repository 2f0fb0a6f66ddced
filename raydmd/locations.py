"""Where a folder of files may lie: a path, file://, s3:// or gs://. Imports nothing heavy; opens nothing."""

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from raydmd.errors import UserError, nearest

KEY = "checkpoint.path"  # the recipe's key, which every message names
OPTIONS = {"file": (), "s3": ("region", "scheme", "endpoint_override", "tls_ca_file_path")}
OPTIONS["gs"] = ("scheme", "endpoint_override", "project_id")
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment, or an instance's role",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS in the environment, or an instance's account",
}


@dataclass(frozen=True)
class Location:
    """A folder.

    Attributes:
        scheme: ``file``, ``s3`` or ``gs``.
        path: the folder, or bucket and prefix.
        options: what the URI says of the server: its endpoint, its region.
        anonymous: whether no credentials are looked for (``gs://anonymous@bucket``).
    """

    scheme: str
    path: str
    options: dict[str, str]
    anonymous: bool = False

    def __str__(self) -> str:
        return self.path if self.scheme == "file" else f"{self.scheme}://{self.path}"


def parse_location(uri: str) -> Location:
    """Read a path or a URI. No message repeats what may be a secret.

    Raises:
        UserError: an unknown scheme or option, credentials inside the URI, or what is neither a path nor a URI.
    """
    scheme, colon, rest = uri.partition(":")
    if not uri.strip():
        raise UserError(f"{KEY}: it is empty")
    if not colon or not ("://" in uri or scheme.lower() in ("s3", "gs", "gcs", "file")):
        return Location("file", uri, {})
    scheme = {"gcs": "gs"}.get(scheme.lower(), scheme.lower())
    if scheme not in OPTIONS:
        if not rest.startswith("//") or not re.fullmatch(r"[a-z][a-z0-9+.-]{0,15}", scheme):
            raise UserError(f"{KEY}: neither a path nor a URI, which begins file://, s3:// or gs://")
        raise UserError(f"{KEY}: unknown scheme '{scheme}'{nearest(scheme, OPTIONS)}")
    if not rest.startswith("//"):
        raise UserError(f"{KEY}: a URI begins {scheme}://")
    if re.search(r"[\s\x00-\x1f#]", uri):
        raise UserError(f"{KEY}: spaces and # are written %20 and %23 in a URI")
    try:
        parts = urlsplit(uri)
        given = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        raise UserError(f"{KEY}: not readable as {scheme}://...?option=value") from None
    anonymous = scheme == "gs" and parts.netloc.startswith("anonymous@")
    host = parts.netloc.removeprefix("anonymous@") if anonymous else parts.netloc
    _refuse_credentials(scheme, host, given)
    if scheme == "file":
        if host or given or not parts.path.strip("/"):
            raise UserError(f"{KEY}: a file URI is file:///absolute/folder")
        return Location("file", unquote(parts.path), {})
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", host):
        raise UserError(f"{KEY}: a bucket's name follows {scheme}://")
    folders = [folder for folder in unquote(parts.path).split("/") if folder]
    if {".", ".."} & set(folders):
        raise UserError(f"{KEY}: . and .. mean nothing in {scheme}://")
    return Location(scheme, "/".join([host, *folders]), dict(given), anonymous)


def absolute_location(uri: str) -> str:
    """Return a path made absolute (``~`` is the home), and a URI as it is."""
    return uri if ":" in uri and parse_location(uri).path != uri else str(Path(uri).expanduser().resolve())


def _refuse_credentials(scheme: str, host: str, given: list[tuple[str, str]]) -> None:
    secret = any(re.search("key|secret|token|password|credential", name.lower()) for name, _ in given)
    if secret or ":" in host or "@" in host or any("@" in value for _, value in given):
        where = f": they come from {CREDENTIALS[scheme]}" if scheme in CREDENTIALS else ""
        raise UserError(f"{KEY}: a URI holds no credentials{where}")
    for name, _ in given:
        if name not in OPTIONS[scheme]:
            said = f"unknown option '{name}'" if re.fullmatch(r"[a-z_]{1,24}", name) else "an unknown option"
            raise UserError(f"{KEY}: {said} of {scheme}://{nearest(name, OPTIONS[scheme])}")
