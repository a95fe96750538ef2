"""Gateways and vLLM servers of the overlay and the RayCluster agree: names, ports, paths, keys, LoRAs."""

from __future__ import annotations

import ast
from typing import Any
from urllib.parse import urlsplit

import pytest
from scalabl_server.settings import ServeSettings

from scalabl.files.adapter_directory import read_config
from tests.deploy import dockerfile
from tests.deploy.manifests import ROOT, Object, container_of, environment_of, loose, one, pod_of, rendered

OVERLAY = "overlays/gateway-vllm"


def settings() -> ServeSettings:
    return dockerfile.settings_in_container(environment_of(rendered(OVERLAY)))


def servers() -> dict[str, Object]:
    """The pods that run vLLM."""
    ray = one(loose("kuberay-vllm.yaml"), "RayCluster")["spec"]
    return {
        "statefulset": one(rendered(OVERLAY), "StatefulSet", "vllm")["spec"]["template"]["spec"],
        "ray": ray["headGroupSpec"]["template"]["spec"],
    }


def flags(pod: Object) -> dict[str, list[str]]:
    """vLLM's flags with their values, from a list of arguments or a shell script."""
    (container,) = pod["containers"]
    words = " ".join(container["args"]).replace("\\\n", " ").replace("=", " ").split()
    flags: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            values = flags.setdefault(word[2:], [])
        elif flags:
            values.append(word)
    return flags


def test_every_server_that_may_come_up_is_one_entry() -> None:
    stateful, service = (one(rendered(OVERLAY), kind, "vllm") for kind in ("StatefulSet", "Service"))
    scaled = one(rendered(OVERLAY), "ScaledObject", "vllm")["spec"]
    assert scaled["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": stateful["metadata"]["name"]}
    (port,) = service["spec"]["ports"]
    assert service["spec"]["clusterIP"] == "None"  # a name for each pod, no load balancer
    assert stateful["spec"]["serviceName"] == service["metadata"]["name"]
    assert "replicas" not in stateful["spec"]
    assert settings().engine == "vllm"
    assert settings().engine_urls == [f"http://vllm-{n}.vllm:{port['port']}" for n in range(scaled["maxReplicaCount"])]


@pytest.mark.parametrize("kind", ["statefulset", "ray"])
def test_a_server_holds_what_the_gateway_asks_of_it(kind: str) -> None:
    given, ours = flags(servers()[kind]), settings()
    config = read_config(ROOT / "examples" / "intent_router" / "adapter")
    assert given["lora-target-modules"] == list(config.target_modules)
    assert int(given["max-lora-rank"][0]) >= config.r
    assert int(given["max-loras"][0]) == ours.num_samples
    assert int(given["max-cpu-loras"][0]) >= ours.num_samples + len(config.target_modules)
    (container,) = servers()[kind]["containers"]
    variables = {variable["name"]: variable for variable in container["env"]}
    assert variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"]["value"] == "1"
    assert str(ours.model) in " ".join(container["args"])
    assert given["port"] == [str(container["ports"][0]["containerPort"])]


@pytest.mark.parametrize("kind", ["statefulset", "ray"])
def test_both_sides_have_the_key_and_the_loras(kind: str) -> None:
    (container,) = servers()[kind]["containers"]
    secret = loose("secrets.example.yaml")[2]
    variables = {variable["name"]: variable for variable in container["env"]}
    reference: dict[str, Any] = variables["VLLM_API_KEY"]["valueFrom"]["secretKeyRef"]
    assert reference["name"] == secret["metadata"]["name"]
    assert reference["key"] in secret["stringData"]
    assert ast.literal_eval(environment_of(rendered(OVERLAY))["SCALABL_ENGINE_API_KEY"]) == {"secretKeyRef": reference}
    pods = {"gateway": (pod_of(rendered(OVERLAY)), container_of(rendered(OVERLAY))), "vllm": (servers()[kind], container)}
    claims = {}
    for side, (pod, container) in pods.items():
        (mount,) = [m for m in container["volumeMounts"] if m["mountPath"] == str(settings().engine_adapter_dir)]
        (volume,) = [v for v in pod["volumes"] if v["name"] == mount["name"]]
        claims[side] = volume["persistentVolumeClaim"]["claimName"]
        assert mount.get("readOnly", False) == (side == "vllm")
    assert claims["gateway"] == claims["vllm"]
    claim = one(rendered(OVERLAY), "PersistentVolumeClaim", claims["gateway"])
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_network_lets_the_gateway_through_and_clients_not() -> None:
    objects = rendered(OVERLAY)
    labels = one(objects, "StatefulSet", "vllm")["spec"]["template"]["metadata"]["labels"]
    out = one(objects, "NetworkPolicy", "scalabl")["spec"]["egress"][-1]
    assert out["to"] == [{"podSelector": {"matchLabels": labels}}]
    assert [port["port"] for port in out["ports"]] == [urlsplit(settings().engine_urls[0]).port]
    policy = one(objects, "NetworkPolicy", "vllm")["spec"]
    assert policy["podSelector"]["matchLabels"] == labels
    (rule,) = policy["ingress"]
    gateway, monitoring = rule["from"]
    assert gateway["podSelector"]["matchLabels"] == one(objects, "Deployment")["spec"]["selector"]["matchLabels"]
    assert set(monitoring) == {"namespaceSelector"}


def test_a_start_may_take_as_long_as_the_engine_is_waited_for() -> None:
    probe = container_of(rendered(OVERLAY))["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] > settings().engine_start_timeout
