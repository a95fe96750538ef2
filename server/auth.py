"""API keys: `Authorization: Bearer <key>` or `X-API-Key: <key>`, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac

from fastapi import Request
from pydantic import SecretStr

from server.problems import ProblemError


class KeyRing:
    """The accepted keys, kept only as hashes. Without any, every request passes."""

    def __init__(self, api_keys: SecretStr | None) -> None:
        keys = api_keys.get_secret_value().split(",") if api_keys is not None else []
        self._hashes = [_hash(key.strip()) for key in keys if key.strip()]

    async def check(self, request: Request) -> None:
        """Route dependency.

        Raises:
            ProblemError: `unauthorized`, for a missing or a wrong key.
        """
        if not self._hashes:
            return
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        key = bearer.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "").strip()
        if not key:
            raise ProblemError("unauthorized", "send a key as 'Authorization: Bearer <key>' or 'X-API-Key: <key>'")
        offered = _hash(key)
        # Every hash is compared, so that the time tells nothing about which one came close.
        matches = [hmac.compare_digest(offered, known) for known in self._hashes]
        if not any(matches):
            raise ProblemError("unauthorized", "the API key is not one that this server knows")


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
