"""API keys: `Authorization: Bearer <key>` or `X-API-Key: <key>`, kept as hashes, compared in constant time.

Keys come from the environment and from a file, which is read again when it changes, as rotated secrets do.
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
SECONDS_BETWEEN_LOOKS = 1.0

# What they say in OpenAPI; the check itself is the route's, before the body is read.
SCHEMES = [
    Depends(HTTPBearer(auto_error=False, description="An API key.")),
    Depends(APIKeyHeader(name="X-API-Key", auto_error=False, description="An API key.")),
]


class ApiKeysError(ScalaBLError):
    """Keys that cannot be used; the message says which one by its place, never what it is."""


class KeyRing:
    """The accepted keys. Without any, every request passes.

    Args:
        api_keys: comma-separated `name:key`, `name:sha256:<hex>` or `key` (named `key-1`, `key-2`, …).
        file: lines of `name:key` or `name:sha256:<hex>`; `#` begins a comment line.

    Raises:
        ApiKeysError: an entry is malformed, or there is none where some were meant to be.
    """

    def __init__(self, api_keys: SecretStr | None = None, file: Path | None = None) -> None:
        self._fixed: dict[bytes, str] = {}
        if api_keys is not None:
            entries = [entry.strip() for entry in api_keys.get_secret_value().split(",")]
            self._fixed = _read((entry for entry in entries if entry), "api_keys: entry", nameless=True)
            if not self._fixed:
                raise ApiKeysError("api_keys is set and holds no key; unset it to serve without keys")
        self._file = file
        self._seen: tuple[int, ...] = ()
        self._looked = time.monotonic()
        self._known = self._fixed | (self._read_file(file) if file is not None else {})

    @property
    def guards(self) -> list[Any]:
        """The dependencies that mark a route as one that wants a key."""
        return SCHEMES if self._known else []

    def check(self, request: Request) -> None:
        """Note the name of the key in the request's trace.

        Raises:
            ProblemError: `unauthorized`, for a missing or a wrong key.
        """
        if not self._known:
            return
        self._look_again()
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        key = bearer.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "").strip()
        if not key:
            raise ProblemError("unauthorized", "send a key as 'Authorization: Bearer <key>' or 'X-API-Key: <key>'")
        offered = _hash(key.encode("latin-1"))
        # Every hash is compared, so that the time tells nothing about which one came close.
        names = [name for known, name in self._known.items() if hmac.compare_digest(offered, known)]
        if not names:
            raise ProblemError("unauthorized", "the API key is not one that this server knows")
        trace.current().key = names[0]

    def _look_again(self) -> None:
        """Read the file again if it has changed; a file that cannot be used leaves the keys as they are."""
        if self._file is None or time.monotonic() - self._looked < SECONDS_BETWEEN_LOOKS:
            return
        self._looked = time.monotonic()
        try:
            if _state(self._file) != self._seen:
                self._known = self._fixed | self._read_file(self._file)
                logger.info("read the API keys again: %s", ", ".join(sorted(set(self._known.values()))))
        except (ApiKeysError, OSError) as error:
            logger.error("the API keys stay as they were: %s", error)

    def _read_file(self, file: Path) -> dict[bytes, str]:
        try:
            self._seen = _state(file)
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ApiKeysError(f"api_keys_file: {file} cannot be read: {reason}") from None
        entries = (line.strip() if not line.lstrip().startswith("#") else "" for line in lines)
        keys = _read(entries, f"api_keys_file: {file}: line", nameless=False)
        if not keys:
            raise ApiKeysError(f"api_keys_file: {file} holds no key; add one as name:key, or leave the option out")
        return keys


def _state(file: Path) -> tuple[int, ...]:
    stat = file.stat()
    return (stat.st_mtime_ns, stat.st_size, stat.st_ino)


def _read(entries: Iterable[str], where: str, *, nameless: bool) -> dict[bytes, str]:
    """Hash -> name of each entry; empty ones are passed over. Messages never quote an entry."""
    keys: dict[bytes, str] = {}
    for number, entry in enumerate(entries, start=1):
        if not entry:
            continue
        name, separator, secret = entry.partition(":")
        if not separator and nameless:
            name, secret = f"key-{number}", entry
        if not separator and not nameless:
            raise ApiKeysError(f"{where} {number}: no name; write name:key")
        if name == "sha256":
            raise ApiKeysError(f"{where} {number}: a hash needs a name; write name:sha256:<hex>")
        if not NAME.fullmatch(name):
            raise ApiKeysError(f"{where} {number}: a name is 1 to 64 letters, digits, dots, dashes or underscores")
        if secret.startswith("sha256:"):
            if not DIGEST.fullmatch(secret):
                raise ApiKeysError(f"{where} {number}: after sha256: come the 64 hexadecimal digits of the key's SHA-256")
            digest = bytes.fromhex(secret.removeprefix("sha256:"))
        elif not secret.strip() or not secret.isascii() or not secret.isprintable():
            raise ApiKeysError(f"{where} {number}: a key is one or more printable ASCII characters")
        else:
            digest = _hash(secret.strip().encode("ascii"))
        if keys.setdefault(digest, name) != name:
            raise ApiKeysError(f"{where} {number}: the same key has two names")
    return keys


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
