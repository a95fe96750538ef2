"""API keys: their formats, names, comparison and reloading, and which routes need one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from scalabl_server.cli.main import app
from scalabl_server.web import auth
from scalabl_server.web.auth import ApiKeysError, KeyRing
from typer.testing import CliRunner

HASHED = f"ci:sha256:{hashlib.sha256(b'hidden').hexdigest()}"
OPEN = {"/health/live", "/health/ready", "/metrics", "/v2/health/live", "/v2/health/ready"}


def status(client: TestClient, key: str) -> int:
    return client.get("/info", headers={"authorization": f"Bearer {key}"}).status_code


def test_every_route_but_those_for_probes_wants_a_key_before_it_reads_the_body(serve: Callable[..., TestClient]) -> None:
    client = serve(api_keys="ann:one")
    document = client.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            url = path.replace("{name}", "colours").replace("{version}", "1")
            response = client.request(method, url, content=b"{" if method == "post" else None)
            assert (response.status_code == 401) is (path not in OPEN), f"{method} {path}: {response.status_code}"
            assert ("security" in operation) is (path not in OPEN)
            assert ("401" in operation["responses"]) is (path not in OPEN)


def test_keys_from_the_environment_and_the_file_have_names_that_are_counted(
    serve: Callable[..., TestClient], tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# who: key\nann:two:with:colons\n\n  bob : three \n{HASHED}\n".replace("bob : ", "bob:"))
    client = serve(api_keys="plain, eve:four", api_keys_file=file)
    for key in ("plain", "four", "two:with:colons", "three", "hidden"):
        assert status(client, key) == 200, key
    for key in ("ann", "sha256", HASHED.partition(":")[2], "two", "Plain", ""):
        assert status(client, key) == 401, key
    assert client.get("/info", headers={"x-api-key": b"fo\xfcr"}).status_code == 401
    metrics = client.get("/metrics").text
    for name in ("key-1", "eve", "ann", "bob", "ci"):
        assert f'scalabl_key_requests_total{{key="{name}"}} 1.0' in metrics
    for secret in ("plain", "four", "three", "hidden"):
        assert secret not in metrics


def test_a_file_that_changes_is_read_again_and_a_bad_one_changes_nothing(
    serve: Callable[..., TestClient], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "SECONDS_BETWEEN_FILE_CHECKS", 0.0)
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("ann:old")
    second.write_text("ann:new\nbob:other")
    link = tmp_path / "keys"  # as Kubernetes mounts a secret
    link.symlink_to(first)
    client = serve(api_keys_file=link)
    assert (status(client, "old"), status(client, "new")) == (200, 401)
    (tmp_path / "next").symlink_to(second)
    os.replace(tmp_path / "next", link)
    assert (status(client, "new"), status(client, "old"), status(client, "other")) == (200, 401, 200)
    for broken in ("no name", "", "ann:"):
        second.write_text(broken)
        assert (status(client, "new"), status(client, "old")) == (200, 401)
    second.unlink()
    assert status(client, "new") == 200


@pytest.mark.parametrize(
    ("keys", "file", "said"),
    [
        (" , ", None, "api_keys is set but contains no key"),
        ("", None, "api_keys is set but contains no key"),
        ("ann:", None, "api_keys: entry 1: a key is one or more printable"),
        ("ok, a b:secret", None, "entry 2: a name is 1 to 64 letters"),
        ("ann:sha256:1234", None, "entry 1: sha256: must be followed by the key's SHA-256 in 64 hexadecimal digits"),
        (f"sha256:{'0' * 64}", None, "entry 1: a hash needs a name"),
        ("ann:secret,bob:secret", None, "entry 2: this key already has another name"),
        ("ann:s\u00e9cret", None, "printable ASCII"),
        (None, "", "contains no key"),
        (None, "# nothing\n", "contains no key"),
        (None, "secret", "line 1: the name is missing; write name:key"),
        (None, "\n\nann:secret\nbob:secret", "line 4: this key already has another name"),
    ],
)
def test_keys_that_cannot_be_used_are_refused_without_being_shown(
    keys: str | None, file: str | None, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "keys"
    if file is not None:
        path.write_text(file)
    with pytest.raises(ApiKeysError, match=said) as refused:
        KeyRing(SecretStr(keys) if keys is not None else None, path if file is not None else None)
    assert "secret" not in str(refused.value)


def test_a_missing_file_ends_the_command_with_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["serve", "--adapter", str(tmp_path), "--api-keys-file", str(tmp_path / "none")])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].endswith("none cannot be read: No such file or directory")
