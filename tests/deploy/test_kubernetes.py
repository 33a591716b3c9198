"""The manifests are valid for the API server's own schemas, and every pod keeps the promises of deploy/README.md."""

import shutil
import subprocess
from collections.abc import Iterator
from typing import Final

import kubernetes_validate
import pytest
import yaml

from tests.source_tree import ROOT

K8S: Final = ROOT / "deploy/k8s"
VERSIONS: Final = ("1.30", "1.33")
"""Containers that start first and go on (`restartPolicy: Always`) are in every cluster from 1.29 on."""
PROBES: Final = ("startupProbe", "readinessProbe", "livenessProbe")


def manifests() -> list[dict[str, object]]:
    """Everything that is written, patches and kustomizations aside."""
    files = [path for path in sorted(K8S.rglob("*.yaml")) if path.name != "kustomization.yaml"]
    return [document for path in files for document in yaml.safe_load_all(path.read_text())]


def kustomized(name: str) -> list[dict[str, object]]:
    """What an overlay comes to; skips where kubectl is not installed."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl, which puts kustomizations together, is not installed here")
    done = subprocess.run(["kubectl", "kustomize", str(K8S / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def pods(documents: list[dict[str, object]]) -> Iterator[tuple[str, dict]]:  # type: ignore[type-arg]
    """Name and specification of every pod that is asked for."""
    for document in documents:
        match document:
            case {
                "kind": "Deployment" | "Job",
                "metadata": {"name": str(name)},
                "spec": {"template": {"spec": dict(spec)}},
            }:
                yield name, spec


def containers(spec: dict) -> list[dict]:  # type: ignore[type-arg]
    return [*spec.get("initContainers", ()), *spec["containers"]]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_manifest_is_valid(version: str) -> None:
    for document in manifests():
        kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("name", ["base", "gpu"])
def test_every_kustomization_is_valid(name: str) -> None:
    documents = kustomized(name)
    for document in documents:
        kubernetes_validate.validate(document, VERSIONS[-1], strict=True)
    assert {name for name, _ in pods(documents)} == {"compute-node", "predictor"}


def test_only_the_node_gets_the_gpu() -> None:
    wanting = [
        container["name"]
        for _, spec in pods(kustomized("gpu"))
        for container in containers(spec)
        if "nvidia.com/gpu" in container["resources"]["limits"]
    ]
    assert wanting == ["compute-node"]


@pytest.mark.parametrize(("name", "spec"), list(pods(manifests())))
def test_a_pod_may_do_next_to_nothing(name: str, spec: dict) -> None:  # type: ignore[type-arg]
    assert spec["automountServiceAccountToken"] is False
    security = spec["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] == security["runAsGroup"] == security["fsGroup"] == 10001
    for container in containers(spec):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "memory" in container["resources"]["limits"]


def test_store_and_node_share_a_pod_and_the_store_is_up_first() -> None:
    spec = dict(pods(manifests()))["compute-node"]
    (store,) = spec["initContainers"]
    (node,) = spec["containers"]
    assert store["name"] == "expert-store"
    assert store["restartPolicy"] == "Always"
    assert "startupProbe" in store
    sockets = [{m["name"]: m["mountPath"] for m in each["volumeMounts"]}["sockets"] for each in (store, node)]
    assert sockets == ["/run/promoe"] * 2


def test_probes_ask_grpc_health() -> None:
    served = {"compute-node": 50051, "predictor": 50052}
    for name, spec in pods(manifests()):
        for container in spec["containers"] if name in served else ():
            assert {probe: container[probe]["grpc"]["port"] for probe in PROBES} == dict.fromkeys(PROBES, served[name])
    (store,) = dict(pods(manifests()))["compute-node"]["initContainers"]
    assert all("promoe.health_probe" in store[probe]["exec"]["command"] for probe in ("startupProbe", "livenessProbe"))


def test_every_pod_is_behind_a_network_policy() -> None:
    selectors = [d["spec"]["podSelector"] for d in manifests() if d["kind"] == "NetworkPolicy"]  # type: ignore[index]
    named = {s["matchLabels"]["app.kubernetes.io/name"] for s in selectors if s}
    assert {} in selectors
    assert {name for name, _ in pods(manifests())} == named
