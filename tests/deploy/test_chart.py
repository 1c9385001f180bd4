"""The chart of deploy/helm and its rendered copy in deploy/kubernetes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from tests.conftest import ROOT
from tests.ports import free_port
from tests.service.serving import served
from tests.service.test_cluster import until

from headrace import __version__, config

CHART = ROOT / "deploy" / "helm" / "headrace"
COPY = ROOT / "deploy" / "kubernetes" / "headrace.yaml"
OBJECTS: dict[tuple[str, str], Any] = {
    (item["kind"], item["metadata"]["name"]): item for item in yaml.safe_load_all(COPY.read_text())
}
NODE = OBJECTS["StatefulSet", "headrace-node"]["spec"]
FRONT = OBJECTS["Deployment", "headrace-front"]["spec"]
SECRETS = {"api-keys": "a-client", "admin-keys": "an-admin", "metrics-keys": "a-scraper"}
PARTS = pytest.mark.parametrize("part", [NODE, FRONT], ids=["node", "front"])

validate = pytest.mark.skipif(
    not shutil.which("kubernetes-validate"), reason="kubernetes-validate is not installed"
)
helm = pytest.mark.skipif(not shutil.which("helm"), reason="helm is not installed")


def environ(part: Any) -> dict[str, str]:
    """Return the variables of a container, as Kubernetes makes them."""
    (container,) = part["template"]["spec"]["containers"]
    variables: dict[str, str] = {}
    for item in container["env"]:
        source = item.get("valueFrom", {})
        if "secretKeyRef" in source:
            variables[item["name"]] = SECRETS[source["secretKeyRef"]["key"]]
        else:
            variables[item["name"]] = item.get("value", "headrace-node-0")
    return variables


@PARTS
def test_the_settings_of_a_pod_exist(part: Any, tmp_path: Path) -> None:
    """Issue 15.4: a variable or a key that is no setting would keep the pod from starting."""
    file = tmp_path / "headrace.toml"
    file.write_text(OBJECTS["ConfigMap", "headrace"]["data"]["headrace.toml"])
    settings = config.load(file=file, environ=environ(part)).config
    assert settings.server.api_keys
    assert settings.server.admin_keys
    spec = part["template"]["spec"]
    assert spec["terminationGracePeriodSeconds"] >= settings.server.drain_s + 30
    mounts = {mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}
    assert {"/tmp", "/etc/headrace", "/var/lib/headrace"} <= mounts
    assert str(settings.cluster.token_file) == "/run/secrets/headrace/token"
    # Kubernetes sets HEADRACE_PORT=tcp://... for a Service of this name otherwise.
    assert spec["enableServiceLinks"] is False


@PARTS
def test_a_pod_has_no_more_rights_than_it_needs(part: Any) -> None:
    """Issue 15.4: not root, a root that cannot be written, no capability, no account."""
    spec = part["template"]["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["containers"][0]["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    user = spec["securityContext"]["runAsUser"]
    assert f"USER {user}:{user}" in (ROOT / "Containerfile").read_text()


@PARTS
def test_probes_do_not_end_a_load(part: Any) -> None:
    """Issue 15.4: liveness asks for the process alone, and gives it a minute."""
    (container,) = part["template"]["spec"]["containers"]
    liveness = container["livenessProbe"]
    assert liveness["httpGet"]["path"] == "/health/live"
    assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 60
    assert container["readinessProbe"]["httpGet"]["path"] == "/health/ready"


def test_names_lead_to_one_another() -> None:
    """Issue 15.4: fronts find nodes by the headless Service, clients fronts by theirs."""
    nodes = OBJECTS["Service", NODE["serviceName"]]["spec"]
    assert nodes["clusterIP"] == "None"
    args = FRONT["template"]["spec"]["containers"][0]["args"]
    assert args[-1] == f"{NODE['serviceName']}:{nodes['ports'][0]['port']}"
    for service, part in (("headrace-nodes", NODE), ("headrace", FRONT)):
        wanted = OBJECTS["Service", service]["spec"]["selector"].items()
        assert wanted <= part["template"]["metadata"]["labels"].items()
        assert wanted == part["selector"]["matchLabels"].items()
    for name, part in (("headrace-node", NODE), ("headrace-front", FRONT)):
        budget = OBJECTS["PodDisruptionBudget", name]["spec"]
        assert (budget["maxUnavailable"], budget["selector"]) == (1, part["selector"])
        assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
    assert "headrace" in environ(FRONT)["HEADRACE_ALLOWED_HOSTS"].split(",")


def test_the_versions_are_the_program_s() -> None:
    facts = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (str(facts["version"]), str(facts["appVersion"])) == (__version__, __version__)


def rendered(*arguments: str) -> str:
    command = ["helm", "template", "headrace", CHART, "--namespace", "default", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.deploy
@helm
def test_the_copy_is_what_the_chart_renders() -> None:
    """Issue 15.4: `UPDATE_DOCS=1` writes it."""
    subprocess.run(["helm", "lint", "--strict", CHART], check=True)
    if os.environ.get("UPDATE_DOCS"):
        COPY.write_text(rendered())
    assert COPY.read_text() == rendered()


@pytest.mark.deploy
@helm
@validate
@pytest.mark.parametrize("version", ["1.29", "1.33"])
def test_kubernetes_accepts_all_values(version: str, tmp_path: Path) -> None:
    """Issue 15, shown 5: validated strictly, with all that can be switched on."""
    values = {
        "nodes": {
            "labels": ["gpu", "large"],
            "memory": "80%",
            "autoscaling": {"enabled": True},
            "storage": {"className": "fast"},
            "resources": {"limits": {"nvidia.com/gpu": 1}},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
            "nodeSelector": {"pool": "gpu"},
            "annotations": {"a": "b"},
            "env": [{"name": "HF_TOKEN", "value": "x"}],
        },
        "imagePullSecrets": [{"name": "registry"}],
        "allowedHosts": ["llm.example.com"],
    }
    file, full = tmp_path / "values.yaml", tmp_path / "full.yaml"
    file.write_text(yaml.safe_dump(values))
    full.write_text(rendered("--values", str(file)))
    command = ["kubernetes-validate", "--strict", "-k", version]
    subprocess.run([*command, COPY, full], check=True)
    kinds = [item["kind"] for item in yaml.safe_load_all(full.read_text())]
    assert kinds.count("HorizontalPodAutoscaler") == 1


@pytest.mark.deploy
@validate
def test_a_field_that_kubernetes_has_not_is_found(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(COPY.read_text().replace("readinessProbe", "readynessProbe"))
    command = ["kubernetes-validate", "--strict", "-k", "1.33", wrong]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "readynessProbe" in done.stdout + done.stderr


@pytest.mark.deploy
@helm
def test_a_value_that_is_misspelt_is_found() -> None:
    """Issue 15.4: the schema has all values of the chart, and no others."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def compare(schema: dict[str, Any], values: dict[str, Any]) -> None:
        assert schema["additionalProperties"] is False
        assert {*schema["properties"]} - {"global"} == {*values}
        for name, value in values.items():
            if "properties" in schema["properties"][name]:
                compare(schema["properties"][name], value)

    compare(schema, values)
    with pytest.raises(subprocess.CalledProcessError) as failed:
        rendered("--set", "node.replicas=3")
    assert "'node' not allowed" in failed.value.stderr


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[str]:
    """What the pods run, as processes: one node, one front; the URL of the front."""
    token, port = tmp_path / "token", free_port()
    token.write_text("a-token-of-the-test-cluster")
    file = tmp_path / "headrace.toml"
    text = OBJECTS["ConfigMap", "headrace"]["data"]["headrace.toml"]
    file.write_text(re.sub(r'model = "\w+"', 'model = "echo"', text).replace("replicas = 2", ""))
    with ExitStack() as stack:
        for part, more in ((NODE, ("--wire-port", str(port))), (FRONT, ())):
            (container,) = part["template"]["spec"]["containers"]
            args = [
                re.sub(r"^headrace-nodes:\d+$", f"localhost:{port}", arg)
                for arg in container["args"]
            ]
            variables = {
                name.removeprefix("HEADRACE_"): value for name, value in environ(part).items()
            } | {"TOKEN_FILE": str(token), "CONFIG": str(file), "HOST": "0.0.0.0"}
            home = str(tmp_path / args[1])
            service = served(
                *args[2:], *more,
                command=args[:2], environment=variables | {"HOME": home, "LOG_FORMAT": "text"},
            )  # fmt: skip
            url = stack.enter_context(service).url
        yield url


@pytest.mark.deploy
def test_what_the_pods_run_answers(cluster: str) -> None:
    """Issue 15.4: the commands, variables and files of the chart make a cluster."""
    url = cluster.replace("0.0.0.0", "127.0.0.1")

    def answered() -> bool:
        body = {"model": "smollm2", "messages": [{"role": "user", "content": "hi"}]}
        head = {"Authorization": "Bearer a-client", "Host": "headrace.default.svc"}
        reply = httpx.post(f"{url}/v1/chat/completions", json=body, headers=head, timeout=60)
        return reply.status_code == 200 and "hi" in reply.json()["choices"][0]["message"]["content"]

    until(answered)
    assert httpx.get(f"{url}/metrics").status_code == 401
    scraper = {"Authorization": "Bearer a-scraper"}
    text = httpx.get(f"{url}/metrics", headers=scraper).text
    gauges = ("requests_queued", "requests_running", "kv_cache_usage_ratio")
    assert [name for name in gauges if f'headrace_{name}{{model="smollm2"}}' not in text] == []
