"""Each rendered overlay is valid on the last four Kubernetes minors and passes the policies; faulty manifests do not."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.manifests import KUBERNETES, LOOSE, OVERLAYS, ROOT, Object, loose, one, pod_of, rendered, tool

HINT = "run `make deploy-check`, which installs it"
validator = pytest.importorskip("kubernetes_validate", reason=f"kubernetes-validate is missing; {HINT}")
MINORS = [version.rpartition(".")[0] for version in validator.utils.all_versions()[-4:]]

# Kinds that Kubernetes itself does not have, and what holds them against a schema.
NODE_KINDS = {("monitoring.coreos.com/v1", "ServiceMonitor"), ("keda.sh/v1alpha1", "ScaledObject")}
KSERVE_KINDS = {("serving.kserve.io/v1alpha1", "ServingRuntime"), ("serving.kserve.io/v1beta1", "InferenceService")}
RAY_KINDS = {("ray.io/v1", "RayCluster")}  # of whose fields nothing here has a schema; its pods are checked


def kind_of(item: Object) -> tuple[str, str]:
    return item["apiVersion"], item["kind"]


def everything() -> dict[str, list[Object]]:
    return {name: rendered(name) for name in OVERLAYS} | {name: loose(name) for name in LOOSE}


def as_pod(objects: list[Object]) -> Object:
    """A pod of its own, for what knows only Kubernetes' kinds."""
    labels = {"app.kubernetes.io/name": "scalabl"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "pod", "namespace": "scalabl", "labels": labels},
        "spec": pod_of(objects),
    }


def ray_pods() -> list[Object]:
    """The pods of the RayCluster's head and workers, each on its own."""
    spec = one(loose("kuberay-vllm.yaml"), "RayCluster")["spec"]
    templates = [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]
    return [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": f"ray-{number}", "namespace": "scalabl", **template["metadata"]},
            "spec": template["spec"],
        }
        for number, template in enumerate(templates)
    ]


@pytest.mark.parametrize("minor", MINORS)
def test_every_object_is_valid_to_the_field(minor: str) -> None:
    objects = [item for objects in everything().values() for item in objects]
    objects += [as_pod(rendered("kserve")), *ray_pods()]
    known = [item for item in objects if kind_of(item) not in NODE_KINDS | KSERVE_KINDS | RAY_KINDS]
    different = {json.dumps(item): item for item in known}.values()  # overlays have most of them in common
    for item in different:
        assert validator.validate(item, minor, strict=True) == minor
    assert len(known) > 40
    assert {item["kind"] for item in different} >= {
        "Deployment",
        "Pod",
        "HorizontalPodAutoscaler",
        "NetworkPolicy",
        "Secret",
        "StatefulSet",
    }


def test_a_misspelt_field_and_a_removed_api_are_not() -> None:
    deployment = copy.deepcopy(one(rendered("base"), "Deployment"))
    deployment["spec"]["template"]["spec"]["terminationGracePeriod"] = 45
    with pytest.raises(validator.ValidationError, match="terminationGracePeriod"):
        validator.validate(deployment, MINORS[-1], strict=True)
    budget = one(rendered("base"), "PodDisruptionBudget") | {"apiVersion": "policy/v1beta1"}
    with pytest.raises(validator.SchemaNotFoundError):
        validator.validate(budget, MINORS[0], strict=True)


def run_node(objects: list[Object]) -> subprocess.CompletedProcess[str]:
    node = tool("node", "install Node.js")
    folder = _npm()
    command = [node, str(ROOT / "deploy" / "tools" / "custom-kinds.mjs")]
    return subprocess.run(command, cwd=folder, input=json.dumps(objects), capture_output=True, text=True, timeout=60)


def _npm() -> Path:
    folder = Path(validator.__file__).parents[4] / "npm"  # beside the environment's own packages
    if not (folder / "node_modules").is_dir():
        pytest.skip(f"npm's schemas are missing; {HINT}, where npm is")
    return folder


def test_objects_of_operators_are_valid_too() -> None:
    objects = [item for name in OVERLAYS for item in rendered(name) if kind_of(item) in NODE_KINDS]
    assert {kind_of(item) for item in objects} == NODE_KINDS
    done = run_node(objects)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": valid") == len(objects)
    broken = copy.deepcopy(one(rendered("overlays/keda"), "ScaledObject"))
    del broken["spec"]["triggers"]
    assert "must have required property triggers" in run_node([broken]).stdout


# The fields of KServe's own types that the two objects may use, from kserve 0.21; the rest is a pod's and checked above.
RUNTIME = {"annotations", "supportedModelFormats", "protocolVersions", "containers", "volumes"}
MODEL = {"runtime", "modelFormat", "protocolVersion", "storageUri"}


def test_the_kserve_objects_fit_together() -> None:
    objects = rendered("kserve")
    runtime, service = one(objects, "ServingRuntime"), one(objects, "InferenceService")
    assert set(runtime["spec"]) == RUNTIME
    model = service["spec"]["predictor"]["model"]
    assert set(model) == MODEL
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    assert model["modelFormat"]["name"] in [item["name"] for item in runtime["spec"]["supportedModelFormats"]]
    (container,) = runtime["spec"]["containers"]
    assert container["name"] == "kserve-container"  # the one that KServe sends requests to
    claim = one(rendered("base"), "PersistentVolumeClaim", "scalabl-models")
    assert model["storageUri"] == f"pvc://{claim['metadata']['name']}"


def findings(folder: Path, *arguments: str) -> list[tuple[str, str, str]]:
    """(file, check, message) of everything that trivy finds."""
    trivy = tool("trivy", HINT)
    command = [trivy, "config", "--skip-check-update", "--quiet", "--format", "json", *arguments, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = json.loads(done.stdout)["Results"]
    return [
        (result["Target"], finding["ID"], finding["Message"])
        for result in results
        for finding in result.get("Misconfigurations", [])
    ]


def test_no_policy_of_trivy_is_broken_and_no_api_is_deprecated(tmp_path: Path) -> None:
    for name, objects in everything().items():
        file = tmp_path / f"{name.replace('/', '-').removesuffix('.yaml')}.yaml"
        file.write_text(yaml.safe_dump_all(objects), encoding="utf-8")
    (tmp_path / "kserve-pod.yaml").write_text(yaml.safe_dump(as_pod(rendered("kserve"))), encoding="utf-8")
    (tmp_path / "ray-pods.yaml").write_text(yaml.safe_dump_all(ray_pods()), encoding="utf-8")
    assert findings(tmp_path, "--k8s-version", f"{MINORS[-1]}.0") == []


# Check of the restricted Pod Security Standard -> a change of the container that breaks it.
BREACHES: dict[str, dict[str, Any]] = {
    "KSV-0001": {"allowPrivilegeEscalation": True},
    "KSV-0012": {"runAsNonRoot": False},
    "KSV-0014": {"readOnlyRootFilesystem": False},
    "KSV-0017": {"privileged": True},
    "KSV-0022": {"capabilities": {"add": ["SYS_ADMIN"], "drop": ["ALL"]}},
    "KSV-0104": {"seccompProfile": {"type": "Unconfined"}},
    "KSV-0106": {"capabilities": {}},
}


def test_the_policies_would_find_a_breach(tmp_path: Path) -> None:
    for check, change in BREACHES.items():
        pod = copy.deepcopy(as_pod(rendered("base")))
        pod["spec"]["containers"][0]["securityContext"] |= change
        inherited = pod["spec"]["securityContext"]
        inherited |= {key: value for key, value in change.items() if key in inherited}
        (tmp_path / f"{check}.yaml").write_text(yaml.safe_dump(pod), encoding="utf-8")
    old = one(rendered("base"), "PodDisruptionBudget") | {"apiVersion": "policy/v1beta1"}
    (tmp_path / "KSV-0107.yaml").write_text(yaml.safe_dump(old), encoding="utf-8")
    breaches = {(file, check) for file, check, _ in findings(tmp_path, "--k8s-version", f"{MINORS[-1]}.0")}
    assert {(f"{check}.yaml", check) for check in [*BREACHES, "KSV-0107"]} <= breaches


def test_the_namespace_enforces_the_restricted_profile() -> None:
    for name in OVERLAYS:
        if name != "kserve":
            labels = one(rendered(name), "Namespace")["metadata"]["labels"]
            assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_every_file_is_part_of_something() -> None:
    files = {path for path in KUBERNETES.rglob("*.yaml") if path.name != "kustomization.yaml"}
    named = {KUBERNETES / name for name in LOOSE}
    for path in KUBERNETES.rglob("kustomization.yaml"):
        lists = yaml.safe_load(path.read_text(encoding="utf-8"))
        named |= {path.parent / entry for entry in lists.get("resources", [])}
        named |= {path.parent / entry["path"] for entry in lists.get("patches", []) if "path" in entry}
    assert files <= named
