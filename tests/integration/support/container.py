"""Building the image without a Docker daemon, and a container of it in namespaces of its own, for tests.

buildah builds; it cannot run with a read-only root in a sandbox without cgroups, so `Container` does what a runtime does:
a read-only mount of the image's root, volumes, tmpfs, the image's user without capabilities, the server as process 1.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BASE = "localhost/scalabl-test-base:bookworm"
IMAGE = "localhost/scalabl-test:latest"
PACKAGES = "ca-certificates,python3,python3-pip,python3-venv"  # with them it has what python:3.11-slim-bookworm has


def _run(*command: str | Path, **options: Any) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout.strip()


def require_tools() -> None:
    """Skip where an image cannot be built."""
    missing = [name for name in ("buildah", "debootstrap", "unshare", "nsenter") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} missing; apt-get install buildah debootstrap util-linux")
    if os.geteuid() != 0:
        pytest.skip("building a base image and mounting it read-only take root")


def base_image() -> str:
    """An image to build on: SCALABL_BASE_IMAGE, or Debian's own packages, once for this machine."""
    given = os.environ.get("SCALABL_BASE_IMAGE")
    if given:
        return given
    if subprocess.run(["buildah", "inspect", "--type", "image", BASE], capture_output=True).returncode == 0:
        return BASE
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "root"
        _run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", root, timeout=900)
        authorities = Path("/etc/ssl/certs/ca-certificates.crt")
        if authorities.exists():  # a proxy of this machine may have its own
            shutil.copy(authorities, root / authorities.relative_to("/"))
        shutil.rmtree(root / "var/lib/apt/lists")
        shutil.rmtree(root / "var/cache/apt")
        (root / "var/lib/apt/lists").mkdir()
        working = _run("buildah", "from", "scratch")
        _run("buildah", "copy", working, root, "/", timeout=300)
        _run("buildah", "commit", working, BASE, timeout=300)
        _run("buildah", "rm", working)
    return BASE


def _pip_mounts() -> list[str]:
    """pip's configuration files of this machine, with the folders that they name, for a build."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "config"]
    debug = _run(*pip, "debug")
    lines = [line.strip().partition(", exists: ") for line in debug.splitlines()]
    files = {Path(name).resolve() for name, _, exists in lines if exists == "True"}
    words = [word.strip("'\"") for line in _run(*pip, "list").splitlines() for word in line.partition("=")[2].split()]
    folders = [Path(urllib.parse.urlparse(word).path if word.startswith("file:") else word) for word in words]
    named = {
        folder.parent if folder.name == "simple" else folder
        for folder in folders
        if folder.is_absolute() and folder.is_dir()
    }
    mounted = {file if file.parent == Path("/etc") else file.parent for file in files}
    return [f"{path}:{path}:ro" for path in sorted(mounted | named)]


def build(context: Path, **arguments: str) -> None:
    """The image from `context`, a copy of the repository's files."""
    command = ["buildah", "bud", "--isolation", "chroot", "--layers", "--format", "docker", "-t", IMAGE]
    for name, value in arguments.items():
        command += ["--build-arg", f"{name}={value}"]
    for mount in _pip_mounts():
        command += ["-v", mount]
    _run(*command, "-f", context / "docker" / "Dockerfile", context, timeout=1800)


def size_of(image: str) -> int:
    """Bytes of an image's layers."""
    listed: list[dict[str, Any]] = json.loads(_run("buildah", "images", "--json", image))
    text = str(listed[0]["size"])
    number, unit = text.split() if " " in text else (text, "B")
    return round(float(number) * {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9}[unit])


class Container:
    """One run of the image: `process` ends with the server's own status."""

    def __init__(
        self, root: Path, config: dict[str, Any], environment: Mapping[str, str], mounts: Mapping[str, Path]
    ) -> None:
        self.root, self.config = root, config
        pairs = dict(entry.split("=", 1) for entry in config["Env"])
        self.environment = pairs | dict(environment)
        self.user = int(config["User"].split(":")[0])
        self._folder = Path(tempfile.mkdtemp(prefix="scalabl-container-"))
        new = self._folder / "root"
        new.mkdir()
        lines = ["set -e", "mount --make-rprivate /"]
        lines += [f"mount --bind {shlex.quote(str(root))} {new}", f"mount -o remount,bind,ro,nosuid,nodev {new}"]
        lines += [f"mount -t proc proc {new}/proc", f"mount --rbind /dev {new}/dev"]
        lines += [f"mount -t tmpfs -o mode=1777,size=512m,noexec,nosuid,nodev tmpfs {new}/tmp"]
        for target, source in mounts.items():
            lines.append(f"mount --bind {shlex.quote(str(source))} {new}{target}")
            if target != "/data":
                lines.append(f"mount -o remount,bind,ro {new}{target}")
        command = [*self._as_user(), *config["Entrypoint"], *config["Cmd"]]
        lines.append(f"cd {new} && exec chroot {new} {shlex.join(command)}")
        self.log_file = self._folder / "log"
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                ["unshare", "--mount", "--pid", "--fork", "sh", "-c", "\n".join(lines)],
                stderr=log,
                stdout=log,
            )

    def _as_user(self) -> list[str]:
        """The image's user, without capabilities and without a way to get any."""
        limits = ["--clear-groups", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return [
            "setpriv",
            f"--reuid={self.user}",
            f"--regid={self.user}",
            *limits,
            "env",
            f"--chdir={self.config['WorkingDir']}",
            "-i",
            *variables,
        ]

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8")

    @property
    def pid(self) -> int:
        """The server's process as this machine numbers it; 1 inside."""
        (child,) = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(child)

    def status(self) -> dict[str, str]:
        """What the kernel says of the server's process."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def processor_seconds(self) -> float:
        """Processor time of the server so far, which says more than the clock on a busy machine."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def root_options(self) -> list[str]:
        """How the server's root is mounted."""
        fields = [line.split() for line in Path(f"/proc/{self.pid}/mountinfo").read_text().splitlines()]
        (options,) = [field[5] for field in fields if field[4] == "/"]
        return options.split(",")

    def execute(self, *command: str, root: bool = False) -> subprocess.CompletedProcess[str]:
        """A command in the container, as its user or as root."""
        inside = ["nsenter", "--target", str(self.pid), "--mount", "--pid", "--root", "--wd"]
        return subprocess.run(
            [*inside, *([] if root else self._as_user()), *command], capture_output=True, text=True, timeout=60
        )

    def health_check(self) -> subprocess.CompletedProcess[str]:
        """The image's HEALTHCHECK, as its metadata has it."""
        kind, *command = self.config["Healthcheck"]["Test"]
        assert kind == "CMD"
        return self.execute(*command)

    def stop(self, seconds: float = 60) -> int:
        """The image's stop signal, and the exit status."""
        os.kill(self.pid, getattr(signal, self.config.get("StopSignal") or "SIGTERM"))
        return self.process.wait(seconds)

    def close(self) -> None:
        if self.process.poll() is None:
            os.kill(self.pid, signal.SIGKILL)  # process 1: whatever else runs there ends with it
        self.process.wait(60)
        shutil.rmtree(self._folder, ignore_errors=True)


@contextmanager
def image() -> Iterator[tuple[Path, dict[str, Any]]]:
    """The built image's root, mounted for as long as the context lasts, and its configuration."""
    name = _run("buildah", "from", IMAGE)
    try:
        root = Path(_run("buildah", "mount", name))
        config: dict[str, Any] = json.loads(_run("buildah", "inspect", "--type", "image", IMAGE))["Docker"]["config"]
        yield root, config
    finally:
        _run("buildah", "umount", name)
        _run("buildah", "rm", name)
