"""compose.yaml and the Containerfile agree with the program and with each other."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml
from tests.conftest import ROOT

from headrace import config

COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
HEADRACE = SERVICES["headrace"]
CONTAINERFILE = (ROOT / "Containerfile").read_text()


def test_the_settings_exist() -> None:
    """Issue 15.5: a variable that is no setting would keep the service from starting."""
    of_image = dict(re.findall(r"^ +(HEADRACE_\w+)=([^\s\\]+)", CONTAINERFILE, re.MULTILINE))
    assert set(of_image) == {"HEADRACE_HOME", "HEADRACE_HOST"}
    variables: dict[str, str] = HEADRACE["environment"]
    given = {name: re.sub(r"\$\{.*\}", "key", text) for name, text in variables.items()}
    file = ROOT / "deploy" / "compose" / "headrace.toml"
    settings = config.load(file=file, environ=of_image | given).config
    assert settings.server.host == "0.0.0.0"
    assert settings.server.api_keys
    assert settings.telemetry.metrics_keys
    assert "smollm2" in settings.models
    # Its own port is checked and published, and answers have the time that they may take.
    assert HEADRACE["ports"] == [f"127.0.0.1:{settings.server.port}:{settings.server.port}"]
    assert f"'HEADRACE_PORT', '{settings.server.port}'" in CONTAINERFILE
    assert int(HEADRACE["stop_grace_period"].removesuffix("s")) > settings.server.drain_s


def test_what_is_mounted_exists() -> None:
    """Issue 15.5: Prometheus, Grafana, its data source and the dashboard are provisioned."""
    mounts = [
        mount.split(":") for service in SERVICES.values() for mount in service.get("volumes", ())
    ]
    files = {source: place for source, place, *_ in mounts if source.startswith(".")}
    assert [source for source in files if not (ROOT / source).exists()] == []
    assert {source for source, *_ in mounts if "/" not in source} == set(COMPOSE["volumes"])
    folder = ROOT / "deploy" / "compose" / "grafana"
    provider = yaml.safe_load((folder / "dashboards.yaml").read_text())["providers"][0]
    assert provider["options"]["path"] == files["./dashboards"]
    source = yaml.safe_load((folder / "datasources.yaml").read_text())["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    assert '"type": "datasource"' in (ROOT / "dashboards" / "headrace.json").read_text()


def test_prometheus_scrapes_the_service() -> None:
    text = (ROOT / "deploy" / "compose" / "prometheus.yml").read_text()
    job = yaml.safe_load(text)["scrape_configs"][0]
    (target,) = job["static_configs"][0]["targets"]
    assert target.partition(":")[0] == HEADRACE["environment"]["HEADRACE_ALLOWED_HOSTS"]
    (secret,) = SERVICES["prometheus"]["secrets"]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{secret}"


@pytest.mark.parametrize("name", SERVICES)
def test_no_service_has_more_than_it_needs(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])


@pytest.mark.deploy
@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
def test_promtool_accepts_the_configuration() -> None:
    file = ROOT / "deploy" / "compose" / "prometheus.yml"
    subprocess.run(["promtool", "check", "config", "--syntax-only", file], check=True)
