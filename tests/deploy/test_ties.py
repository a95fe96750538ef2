"""Dockerfile, compose file, manifests and server agree: variables, ports, paths, users, probes, times, metrics."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import yaml
from scalabl_server import healthcheck
from scalabl_server.app import create_admin_app, create_app
from scalabl_server.observe.metrics import Metrics
from scalabl_server.settings import ServeSettings
from scalabl_server.web.draining import FINAL_ANSWER_SECONDS

from scalabl import __version__
from tests.deploy import dockerfile
from tests.deploy.manifests import (
    KUBERNETES,
    OVERLAYS,
    ROOT,
    SERVERS,
    container_of,
    environment_of,
    loose,
    one,
    pod_of,
    rendered,
)

COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8"))
SERVER = COMPOSE["services"]["server"]


@functools.cache
def paths(admin_port: int | None) -> dict[str, set[str]]:
    """What each port answers."""
    main = create_app(ServeSettings(adapter=Path("x"), outcomes_url="none", admin_port=admin_port))
    return {name: set(app.openapi()["paths"]) for name, app in (("http", main), ("admin", create_admin_app(main)))}


def seconds(text: str) -> int:
    return int(text[:-1]) * {"s": 1, "m": 60, "h": 3600}[text[-1]]


def test_every_variable_is_a_flag_of_the_server() -> None:
    flags = {f"SCALABL_{name.upper()}" for name in ServeSettings.model_fields}
    places = {name: environment_of(rendered(name)) for name in OVERLAYS}
    places |= {"compose": SERVER["environment"], "image": dockerfile.environment()}
    for place, variables in places.items():
        ours = {name for name in variables if name.startswith("SCALABL_")}
        assert ours, place
        assert ours <= flags, place
    for place, variables in places.items():
        if place != "image":
            dockerfile.settings_in_container(variables)  # every value can be read


def test_a_cluster_sets_no_variable_by_itself() -> None:
    """A Service named scalabl would set SCALABL_PORT to an address, as links of Docker's kind."""
    for name in OVERLAYS:
        assert pod_of(rendered(name))["enableServiceLinks"] is False


@pytest.mark.parametrize("name", OVERLAYS)
def test_ports_are_those_that_the_server_listens_on(name: str) -> None:
    settings = dockerfile.settings_in_container(environment_of(rendered(name)))
    ports = {port["name"]: port["containerPort"] for port in container_of(rendered(name))["ports"]}
    if name == "kserve":
        assert ports == {"http1": settings.port}
        annotations = one(rendered(name), "ServingRuntime")["spec"]["annotations"]
        assert annotations["prometheus.kserve.io/port"] == str(settings.port)
    else:
        assert ports == {"http": settings.port, "admin": settings.admin_port}
        assert settings.admin_host == "0.0.0.0"
        service = one(rendered(name), "Service")["spec"]
        assert {port["targetPort"] for port in service["ports"]} == set(ports)
        assert one(rendered(name), "ServiceMonitor")["spec"]["endpoints"][0]["port"] in [p["name"] for p in service["ports"]]
        rules = one(rendered(name), "NetworkPolicy")["spec"]["ingress"]
        assert [port["port"] for rule in rules for port in rule["ports"]] == ["http", "admin"]
    assert settings.host == "0.0.0.0"


@pytest.mark.parametrize("name", OVERLAYS)
def test_probes_ask_what_the_server_answers(name: str) -> None:
    container, settings = container_of(rendered(name)), dockerfile.settings_in_container(environment_of(rendered(name)))
    answers = paths(settings.admin_port)
    by_port = answers | {settings.port: answers["http"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[probe]["httpGet"]
        assert asked["path"] in by_port[asked["port"]], probe
    assert container["livenessProbe"]["httpGet"]["path"].endswith("/live")
    assert container["readinessProbe"]["httpGet"]["path"].endswith("/ready")
    assert container["startupProbe"]["httpGet"]["path"].endswith("/ready")  # live at once, ready when it is loaded
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 300
    liveness = container["livenessProbe"]
    # A stuck pass fails it only after --worker-timeout; a busy event loop must not look like one.
    assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 30
    if name != "kserve":
        monitored = one(rendered(name), "ServiceMonitor")["spec"]["endpoints"][0]
        assert monitored["path"] in by_port["admin"] - by_port["http"]
    else:
        annotations = one(rendered(name), "ServingRuntime")["spec"]["annotations"]
        assert annotations["prometheus.kserve.io/path"] in by_port["http"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_grace_period_is_longer_than_the_drain(name: str) -> None:
    settings, container = dockerfile.settings_in_container(environment_of(rendered(name))), container_of(rendered(name))
    sleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    readiness = container["readinessProbe"]
    assert sleep >= 5
    assert pod_of(rendered(name))["terminationGracePeriodSeconds"] >= (
        sleep + max(settings.shutdown_timeout, settings.drain_delay) + FINAL_ANSWER_SECONDS + 5
    )
    assert readiness["periodSeconds"] * readiness["failureThreshold"] <= 10


def test_compose_waits_for_the_drain_too() -> None:
    settings = dockerfile.settings_in_container(SERVER["environment"])
    assert seconds(SERVER["stop_grace_period"]) >= settings.shutdown_timeout + FINAL_ANSWER_SECONDS + 5
    assert dockerfile.final("STOPSIGNAL") == ["SIGTERM"]


def test_whoever_runs_it_is_the_images_user() -> None:
    (user,) = dockerfile.final("USER")
    number = int(user.partition(":")[0])
    assert user == f"{number}:{number}"
    assert SERVER["user"] == user
    pods = [pod_of(rendered(name)) for name in OVERLAYS] + [one(loose("load-models.yaml"), "Pod")["spec"]]
    for pod in pods:
        for context in (pod["securityContext"], pod["containers"][0]["securityContext"]):
            assert (context["runAsUser"], context["runAsGroup"]) == (number, number)
        assert pod["securityContext"]["fsGroup"] == number


@pytest.mark.parametrize("name", SERVERS)
def test_what_the_server_reads_and_writes_is_mounted(name: str) -> None:
    settings, objects = dockerfile.settings_in_container(environment_of(rendered(name))), rendered(name)
    mounts = {mount["mountPath"]: mount for mount in container_of(objects)["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod_of(objects)["volumes"]}
    assert set(volumes) == {mount["name"] for mount in mounts.values()}
    assert settings.data_dir == Path("/data")
    for path in ("/data", "/tmp"):
        assert not mounts[path].get("readOnly")
    assert settings.api_keys_file is not None
    keys = mounts[str(settings.api_keys_file.parent)]
    secret = loose("secrets.example.yaml")[0]
    assert volumes[keys["name"]]["secret"]["secretName"] == secret["metadata"]["name"]
    assert settings.api_keys_file.name in secret["stringData"]
    assert str(settings.adapter).startswith("/models/")
    assert str(settings.model).startswith("/models/")
    assert ("/models" in mounts) == (name != "baked")
    claims = {item["metadata"]["name"] for item in objects if item["kind"] == "PersistentVolumeClaim"}
    used = {volume["persistentVolumeClaim"]["claimName"] for volume in volumes.values() if "persistentVolumeClaim" in volume}
    assert used == claims


def test_replicas_share_a_database_and_nothing_else() -> None:
    for name in ("overlays/high-availability", "overlays/keda"):
        variables = environment_of(rendered(name))
        secret = loose("secrets.example.yaml")[1]
        assert secret["metadata"]["name"] in variables["SCALABL_OUTCOMES_URL"]
        assert set(secret["stringData"]) == {"url"}
        assert "metadata.name" in variables["SCALABL_REPLICA_ID"]
        volumes = {volume["name"]: volume for volume in pod_of(rendered(name))["volumes"]}
        assert set(volumes["data"]) == {"name", "emptyDir"}
        deployment = one(rendered(name), "Deployment")["spec"]
        assert "replicas" not in deployment
        assert deployment["strategy"]["type"] == "RollingUpdate"
        assert one(rendered(name), "PersistentVolumeClaim")["spec"]["accessModes"] == ["ReadWriteMany"]
        assert {"port": 5432, "protocol": "TCP"} in one(rendered(name), "NetworkPolicy")["spec"]["egress"][-1]["ports"]
    for name in ("base", "overlays/cpu", "overlays/gpu"):  # SQLite: never two of them
        assert one(rendered(name), "Deployment")["spec"]["strategy"]["type"] == "Recreate"
        assert environment_of(rendered(name))["SCALABL_REPLICA_ID"] == "scalabl"


def test_both_autoscalers_look_at_the_queue_alike() -> None:
    gauges = {family.name for family in Metrics().registry.collect() if family.type == "gauge"}
    autoscaler = one(rendered("overlays/high-availability"), "HorizontalPodAutoscaler")["spec"]
    (metric,) = [item["pods"] for item in autoscaler["metrics"]]
    assert metric["metric"]["name"] in gauges
    scaled = one(rendered("overlays/keda"), "ScaledObject")["spec"]
    (trigger,) = scaled["triggers"]
    assert trigger["metadata"]["query"] == f'sum({metric["metric"]["name"]}{{namespace="scalabl"}})'
    assert trigger["metadata"]["threshold"] == metric["target"]["averageValue"]
    assert trigger["metricType"] == metric["target"]["type"]
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"]) == (autoscaler["minReplicas"], autoscaler["maxReplicas"])
    assert all(item["kind"] != "HorizontalPodAutoscaler" for item in rendered("overlays/keda"))
    for item in (autoscaler, scaled):
        assert item["scaleTargetRef"]["name"] == one(rendered("overlays/keda"), "Deployment")["metadata"]["name"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_resources_fit_the_server(name: str) -> None:
    container = container_of(rendered(name))
    assert "limits.cpu" in environment_of(rendered(name))["SCALABL_THREADS"]
    assert container["resources"]["limits"]["cpu"].isdecimal()
    assert set(container["resources"]["requests"]) == set(container["resources"]["limits"])
    gpu = container["resources"]["limits"].get("nvidia.com/gpu")
    assert (gpu, container["image"].rpartition("-")[2]) == (("1", "cuda") if name == "overlays/gpu" else (None, "cpu"))
    if gpu:
        assert environment_of(rendered(name))["SCALABL_DEVICE"] == "cuda"
        volumes = {volume["name"]: volume for volume in pod_of(rendered(name))["volumes"]}
        (shared,) = [mount for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
        assert volumes[shared["name"]]["emptyDir"]["medium"] == "Memory"


def test_selectors_select_the_pods() -> None:
    for name in SERVERS:
        objects = rendered(name)
        labels = one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
        selectors = [one(objects, "Service")["spec"]["selector"]]
        kinds = ("Deployment", "PodDisruptionBudget")
        selectors += [one(objects, kind)["spec"]["selector"]["matchLabels"] for kind in kinds]
        selectors.append(one(objects, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"])
        selectors += [
            constraint["labelSelector"]["matchLabels"] for constraint in pod_of(objects)["topologySpreadConstraints"]
        ]
        assert all(selector.items() <= labels.items() for selector in selectors)
        monitored = one(objects, "ServiceMonitor")["spec"]["selector"]["matchLabels"]
        assert monitored.items() <= one(objects, "Service")["metadata"]["labels"].items()


def test_images_carry_the_packages_version() -> None:
    for name in OVERLAYS:
        assert container_of(rendered(name))["image"].startswith(f"scalabl:{__version__}-")
    assert one(loose("load-models.yaml"), "Pod")["spec"]["containers"][0]["image"] == f"scalabl:{__version__}-cpu"
    assert SERVER["image"] == f"scalabl:{__version__}-${{VARIANT:-cpu}}"
    assert dockerfile.arguments()["VERSION"] == __version__


def test_the_health_check_asks_the_port_that_the_image_exposes() -> None:
    command, options = dockerfile.health_check()
    assert command == ["python", "-m", healthcheck.__name__]
    settings = dockerfile.settings_in_container(SERVER["environment"])
    assert dockerfile.final("EXPOSE") == [str(settings.port)]
    url = healthcheck.address(dockerfile.environment())
    assert url == f"http://127.0.0.1:{settings.port}/health/ready"
    assert seconds(options["timeout"]) > healthcheck.TIMEOUT_SECONDS
    assert seconds(options["start-period"]) >= 300


def test_the_compose_file_runs_it_as_the_dockerfile_means_it() -> None:
    settings = dockerfile.settings_in_container(SERVER["environment"])
    assert SERVER["ports"] == [f"127.0.0.1:{settings.port}:{settings.port}"]
    assert SERVER["read_only"] is True
    targets = [volume.removesuffix(":ro").rpartition(":")[2] for volume in SERVER["volumes"]]
    assert targets == ["/models", str(settings.data_dir)]
    assert [mount.partition(":")[0] for mount in SERVER["tmpfs"]] == ["/tmp"]
    assert dockerfile.words("VOLUME") == [str(settings.data_dir)]
    assert settings.threads == SERVER["cpus"]
    assert SERVER["build"]["args"] == {"VARIANT": "${VARIANT:-cpu}"}
    assert (ROOT / "docker" / SERVER["build"]["context"]).resolve() == ROOT
    assert {"VARIANT", "MODELS", "BASE_IMAGE", "TORCH_INDEX", "REVISION"} <= set(dockerfile.arguments())


def test_prometheus_and_grafana_find_what_the_compose_file_mounts() -> None:
    def inside(service: str, path: str) -> Path:
        """The file or folder of the repository that a service sees at a path."""
        for volume in COMPOSE["services"][service]["volumes"]:
            source, target = volume.removesuffix(":ro").split(":")
            if Path(path).is_relative_to(target) and source.startswith("."):
                return (ROOT / "docker" / source / Path(path).relative_to(target)).resolve()
        raise AssertionError(f"{service} has nothing at {path}")

    configuration = inside("prometheus", "/etc/prometheus/prometheus.yml")
    prometheus = yaml.safe_load(configuration.read_text(encoding="utf-8"))
    (scraped,) = prometheus["scrape_configs"]
    port = dockerfile.settings_in_container(SERVER["environment"]).port
    assert scraped["static_configs"] == [{"targets": [f"server:{port}"]}]
    assert scraped.get("metrics_path", "/metrics") in paths(None)["http"]
    (pattern,) = prometheus["rule_files"]
    rules = inside("prometheus", f"/etc/prometheus/{Path(pattern).parent}")
    assert sorted(rules.glob(Path(pattern).name)) == sorted((ROOT / "deploy" / "prometheus" / "rules").iterdir())

    provisioning = inside("grafana", "/etc/grafana/provisioning")
    for file in (provisioning / "dashboards").iterdir():
        for provider in yaml.safe_load(file.read_text(encoding="utf-8"))["providers"]:
            assert len(list(inside("grafana", provider["options"]["path"]).glob("*.json"))) == 2
    for file in (provisioning / "datasources").iterdir():
        for source in yaml.safe_load(file.read_text(encoding="utf-8"))["datasources"]:
            (published,) = COMPOSE["services"]["prometheus"]["ports"]
            assert source["url"] == f"http://prometheus:{published.rpartition(':')[2]}"
    # One job name for both ways of scraping, since rules and dashboards may ask for it.
    assert scraped["job_name"] == one(rendered("base"), "Service")["metadata"]["name"]


def test_every_service_is_confined_and_only_this_machine_reaches_it() -> None:
    for name, service in COMPOSE["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["mem_limit"], name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert "latest" not in service["image"], name


def test_the_overlays_of_the_issue_are_there() -> None:
    assert {path.name for path in (KUBERNETES / "overlays").iterdir()} == {
        "cpu", "gpu", "high-availability", "keda", "gateway-vllm",
    }  # fmt: skip
