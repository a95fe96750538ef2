"""Commands in the deployment sections match the files: paths, overlays, targets, arguments, secrets, ports."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path

import pytest
import yaml

from scalabl import __version__
from tests.deploy import dockerfile
from tests.deploy.manifests import KUBERNETES, OVERLAYS, ROOT, SERVERS, environment_of, loose, one, rendered

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
SCALING = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").partition("## In Kubernetes\n")[2].partition("\n## ")[0]
SECTION = README.partition("## Deployment\n")[2].partition("\n## ")[0]


def commands(text: str) -> list[list[str]]:
    """The words of each command in the text's shell blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    return [shlex.split(line) for line in lines]


COMMANDS = commands(SECTION) + commands(PAGE) + commands(SCALING)


def after(words: list[str], *options: str) -> list[str]:
    return [value for option, value in itertools.pairwise(words) if option in options]


def of(*start: str) -> list[list[str]]:
    commands = [words for words in COMMANDS if words[: len(start)] == list(start)]
    assert commands, start
    return commands


def test_no_command_is_of_another_kind() -> None:
    programs = {next(word for word in words if "=" not in word) for words in COMMANDS}
    assert programs == {"make", "docker", "kubectl"}
    assert len(commands(SECTION)) == 10


def test_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for _, target in of("make"):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
    assert re.findall(r"models/\S+", makefile)[:3] == [
        "models/base",
        "models/adapters/intent-router",
        "models/adapters/intent-router/",
    ]


def test_compose_files_exist_and_what_they_publish_is_named() -> None:
    composed = [words for words in COMMANDS if "compose" in words]
    files = {file for words in composed for file in after(words, "-f")}
    assert files == {"docker/compose.yaml", "docker/compose.gpu.yaml"}
    assert all((ROOT / file).is_file() for file in files)
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8"))["services"]
    for service in services.values():
        (port,) = service["ports"]
        assert port.split(":")[1] in SECTION
    variables = {word.partition("=")[0] for words in composed for word in words if re.match(r"[A-Z]+=", word)}
    assert variables <= set(re.findall(r"\$\{(\w+)", (ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8")))


def test_images_are_built_as_the_manifests_name_them() -> None:
    tags = set()
    for words in of("docker", "build"):
        assert after(words, "-f") == ["docker/Dockerfile"]
        assert words[-1] == "."
        assert {option.partition("=")[0] for option in after(words, "--build-arg")} <= set(dockerfile.arguments())
        tags |= set(after(words, "-t"))
    assert tags == {f"scalabl:{__version__}-cpu", f"scalabl:{__version__}-cuda"}
    shown = set(re.findall(r"^\| (`[A-Z_`, ]+`) \|", PAGE, flags=re.MULTILINE))
    assert {name for option in shown for name in re.findall(r"[A-Z_]+", option)} == set(dockerfile.arguments())


def test_the_container_is_run_with_what_the_image_needs() -> None:
    (words,) = of("docker", "run")
    assert words[-1] == f"scalabl:{__version__}-cpu"
    assert "--read-only" in words
    assert [option.split(":")[1] for option in after(words, "-v")] == ["/models", *dockerfile.words("VOLUME")]
    assert {option.partition("=")[0] for option in after(words, "-e")} == {"SCALABL_MODEL", "SCALABL_ADAPTER"}
    assert after(words, "-p") == [f"127.0.0.1:{(port := dockerfile.final('EXPOSE')[0])}:{port}"]


def test_overlays_and_files_that_are_applied_exist() -> None:
    for words in of("kubectl", "apply"):
        for folder in after(words, "-k"):
            assert str(Path(folder).relative_to("deploy/kubernetes")) in OVERLAYS
        for file in after(words, "-f"):
            assert (ROOT / file).is_file()
    for name in OVERLAYS:
        if name not in ("base", "baked"):
            assert f"`{name}`" in PAGE
    assert all(f"`components/{path.name}`" in PAGE for path in (KUBERNETES / "components").iterdir())


@pytest.mark.parametrize("name", SERVERS)
def test_what_is_applied_first_is_what_the_loading_pod_needs(name: str) -> None:
    (label,) = {selector for words in of("kubectl", "apply") for selector in after(words, "-l")}
    key, _, value = label.partition("=")
    first = [item for item in rendered(name) if item["metadata"].get("labels", {}).get(key) == value]
    others = [item for item in rendered(name) if item not in first]
    assert one(first, "Namespace")
    assert {item["kind"] for item in first} <= {"Namespace", "PersistentVolumeClaim"}
    assert not any(item["kind"] in ("Namespace", "PersistentVolumeClaim") for item in others)


def test_models_are_copied_to_where_the_server_looks() -> None:
    (copy,) = of("kubectl", "cp")
    pod = one(loose("load-models.yaml"), "Pod")
    (mount,) = pod["spec"]["containers"][0]["volumeMounts"]
    assert copy[2:] == ["models/.", f"{pod['metadata']['namespace']}/{pod['metadata']['name']}:{mount['mountPath']}"]
    variables = environment_of(rendered("overlays/cpu"))
    assert variables["SCALABL_MODEL"] == f"{mount['mountPath']}/base"
    assert variables["SCALABL_ADAPTER"] == f"{mount['mountPath']}/adapters/intent-router"
    assert variables["SCALABL_ADAPTER"].removeprefix("/") in (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in of("kubectl", "-n"):
        assert words[2] == pod["metadata"]["namespace"]


def test_secrets_are_made_as_the_manifests_ask_for_them() -> None:
    keys = {}
    for words in of("kubectl", "-n", "scalabl", "create", "secret", "generic"):
        (literal,) = after(words, "--from-literal") or [words[-1].removeprefix("--from-literal=")]
        keys[words[6]] = {literal.partition("=")[0]}
    assert keys == {secret["metadata"]["name"]: set(secret["stringData"]) for secret in loose("secrets.example.yaml")}
    assert "scalabl-api-keys" in SECTION
