"""API keys, sent as `Authorization: Bearer <key>` or `X-API-Key: <key>`; stored as hashes, compared in constant time.

Keys come from the settings and from a file. The file is read again when it changes, so that keys can be rotated.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPBearer
from pydantic import SecretStr

from scalabl.errors import ScalaBLError
from scalabl_server.observe import trace
from scalabl_server.problems import ProblemError

logger = logging.getLogger("scalabl")

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
DIGEST = re.compile(r"sha256:[0-9a-fA-F]{64}")
SECONDS_BETWEEN_FILE_CHECKS = 1.0

# These only document the keys in OpenAPI. The routes of `guard` check the key, before they read the body.
SCHEMES = [
    Depends(HTTPBearer(auto_error=False, description="An API key.")),
    Depends(APIKeyHeader(name="X-API-Key", auto_error=False, description="An API key.")),
]


class ApiKeysError(ScalaBLError):
    """Keys that cannot be used. The message names an entry by its position and never shows the key."""


class KeyRing:
    """The accepted keys. If there are none, every request is allowed.

    Args:
        api_keys: comma-separated `name:key`, `name:sha256:<hex>` or `key` (named `key-1`, `key-2`, …).
        file: lines of `name:key` or `name:sha256:<hex>`; a line that starts with `#` is a comment.

    Raises:
        ApiKeysError: an entry is malformed, or a source that is set has no entry.
    """

    def __init__(self, api_keys: SecretStr | None = None, file: Path | None = None) -> None:
        self._fixed: dict[bytes, str] = {}
        if api_keys is not None:
            entries = [entry.strip() for entry in api_keys.get_secret_value().split(",")]
            self._fixed = _read((entry for entry in entries if entry), "api_keys: entry", nameless=True)
            if not self._fixed:
                raise ApiKeysError("api_keys is set but contains no key; unset it to serve without keys")
        self._file = file
        self._file_state: tuple[int, ...] = ()
        self._checked_at = time.monotonic()
        self._known = self._fixed | (self._read_file(file) if file is not None else {})

    @property
    def guards(self) -> list[Any]:
        """The FastAPI dependencies that mark a route as one that needs a key."""
        return SCHEMES if self._known else []

    def check(self, request: Request) -> None:
        """Check the request's key, and write its name to the request's trace.

        Raises:
            ProblemError: `unauthorized`, for a missing or a wrong key.
        """
        if not self._known:
            return
        self._reload_if_changed()
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        key = bearer.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "").strip()
        if not key:
            raise ProblemError("unauthorized", "send a key as 'Authorization: Bearer <key>' or 'X-API-Key: <key>'")
        offered = _hash(key.encode("latin-1"))
        # Compare with every hash, so that the time does not depend on which key matches.
        names = [name for known, name in self._known.items() if hmac.compare_digest(offered, known)]
        if not names:
            raise ProblemError("unauthorized", "this server does not know the API key; send a valid one")
        trace.current().key = names[0]

    def _reload_if_changed(self) -> None:
        """Read the file again if it has changed. If it cannot be used, keep the old keys."""
        if self._file is None or time.monotonic() - self._checked_at < SECONDS_BETWEEN_FILE_CHECKS:
            return
        self._checked_at = time.monotonic()
        try:
            if _state(self._file) != self._file_state:
                self._known = self._fixed | self._read_file(self._file)
                logger.info("reloaded the API keys; the names are now: %s", ", ".join(sorted(set(self._known.values()))))
        except (ApiKeysError, OSError) as error:
            logger.error("the API keys could not be reloaded, the old ones stay valid: %s", error)

    def _read_file(self, file: Path) -> dict[bytes, str]:
        try:
            self._file_state = _state(file)
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ApiKeysError(f"api_keys_file: {file} cannot be read: {reason}") from None
        entries = (line.strip() if not line.lstrip().startswith("#") else "" for line in lines)
        keys = _read(entries, f"api_keys_file: {file}: line", nameless=False)
        if not keys:
            raise ApiKeysError(f"api_keys_file: {file} contains no key; add one as name:key, or leave the option out")
        return keys


def _state(file: Path) -> tuple[int, ...]:
    """What differs once the file has been changed or replaced."""
    stat = file.stat()
    return (stat.st_mtime_ns, stat.st_size, stat.st_ino)


def _read(entries: Iterable[str], where: str, *, nameless: bool) -> dict[bytes, str]:
    """Hash -> name of each entry; empty entries are skipped. Error messages never quote an entry."""
    keys: dict[bytes, str] = {}
    for number, entry in enumerate(entries, start=1):
        if not entry:
            continue
        name, separator, secret = entry.partition(":")
        if not separator and nameless:
            name, secret = f"key-{number}", entry
        if not separator and not nameless:
            raise ApiKeysError(f"{where} {number}: the name is missing; write name:key")
        if name == "sha256":
            raise ApiKeysError(f"{where} {number}: a hash needs a name; write name:sha256:<hex>")
        if not NAME.fullmatch(name):
            raise ApiKeysError(f"{where} {number}: a name is 1 to 64 letters, digits, dots, dashes or underscores")
        if secret.startswith("sha256:"):
            if not DIGEST.fullmatch(secret):
                raise ApiKeysError(
                    f"{where} {number}: sha256: must be followed by the key's SHA-256 in 64 hexadecimal digits"
                )
            digest = bytes.fromhex(secret.removeprefix("sha256:"))
        elif not secret.strip() or not secret.isascii() or not secret.isprintable():
            raise ApiKeysError(f"{where} {number}: a key is one or more printable ASCII characters")
        else:
            digest = _hash(secret.strip().encode("ascii"))
        if keys.setdefault(digest, name) != name:
            raise ApiKeysError(f"{where} {number}: this key already has another name; remove one of the two entries")
    return keys


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
