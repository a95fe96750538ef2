"""Renders each Kubernetes overlay with kubectl, once for all tests."""

from __future__ import annotations

import copy
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
OVERLAYS = (
    "base",
    "overlays/cpu",
    "overlays/gpu",
    "overlays/high-availability",
    "overlays/keda",
    "overlays/gateway-vllm",
    "kserve",
    "baked",
)
SERVERS = tuple(name for name in OVERLAYS if name != "kserve")  # those with a Deployment
LOOSE = ("load-models.yaml", "secrets.example.yaml", "kuberay-vllm.yaml")  # applied by themselves

Object = dict[str, Any]


def tool(name: str, hint: str) -> str:
    """The path of a program, from the environment that the tests run in or the machine; skips where there is none."""
    program = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if program is None:
        pytest.skip(f"{name} is missing; {hint}")
    return program


@functools.cache
def _rendered(name: str) -> str:
    kubectl = tool("kubectl", "install kubectl 1.27 or newer")
    with tempfile.TemporaryDirectory() as scratch:
        folder = KUBERNETES / name
        if name == "baked":  # as the component's comment says to use it
            folder = Path(scratch)
            parts = {"resources": "overlays/cpu", "components": "components/baked-models"}
            lists = {key: [os.path.relpath(KUBERNETES / path, folder.resolve())] for key, path in parts.items()}
            head = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
            (folder / "kustomization.yaml").write_text(yaml.safe_dump(head | lists), encoding="utf-8")
        done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rendered(name: str) -> list[Object]:
    """The objects of an overlay."""
    return [document for document in yaml.safe_load_all(_rendered(name)) if document]


def loose(name: str) -> list[Object]:
    """The objects of a file that no overlay includes."""
    return list(yaml.safe_load_all((KUBERNETES / name).read_text(encoding="utf-8")))


def one(objects: list[Object], kind: str, name: str | None = None) -> Object:
    """The only object of a kind and name; without a name, of several the server's own."""
    matching = [item for item in objects if item["kind"] == kind and name in (None, item["metadata"]["name"])]
    if len(matching) > 1 and name is None:
        return one(matching, kind, "scalabl")
    (only,) = matching
    return only


def pod_of(objects: list[Object]) -> Object:
    """The pod's spec of an overlay's Deployment, or the one that KServe makes of its two objects."""
    if any(item["kind"] == "InferenceService" for item in objects):
        runtime, predictor = one(objects, "ServingRuntime")["spec"], one(objects, "InferenceService")["spec"]["predictor"]
        own = {"minReplicas", "maxReplicas", "model"}
        pod = {key: copy.deepcopy(value) for key, value in predictor.items() if key not in own}
        return pod | {key: copy.deepcopy(runtime[key]) for key in ("containers", "volumes")}
    pod_spec: Object = one(objects, "Deployment")["spec"]["template"]["spec"]
    return pod_spec


def container_of(objects: list[Object]) -> Object:
    """The server's container."""
    (container,) = pod_of(objects)["containers"]
    return container


def environment_of(objects: list[Object]) -> dict[str, str]:
    """The variables that the server gets, its own only; what the cluster fills in as the path that it takes it from."""
    container = container_of(objects)
    variables: dict[str, str] = {}
    for source in container.get("envFrom", []):
        variables |= one(objects, "ConfigMap", source["configMapRef"]["name"])["data"]
    for entry in container.get("env", []):
        source = entry.get("valueFrom")
        variables[entry["name"]] = entry["value"] if source is None else str(source)
    return variables


def keys(value: Any) -> Iterator[str]:
    """Every key of nested mappings."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys(inner)
