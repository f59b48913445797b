"""The compose files: what they run is what `uellm serve` runs, told by settings that exist.

That containers come up is not tested here (docs/performance.md says when they did); that the files
say what they mean is.
"""

import importlib
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from uellm.config import CLIENT_VARIABLES, ROLES, ServiceSettings

ROOT = Path(__file__).parents[2]
# Standard of OpenTelemetry, read by its exporter.
FOREIGN = re.compile(r"OTEL_EXPORTER_OTLP_\w+")
# What docker-compose 1.29, still the packaged one in places, does not take.
TOO_NEW = {"name", "include", "develop", "gpus", "attach", "pull_policy"}


def load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return content


COMPOSE = load("compose.yaml")
SERVICES: dict[str, Any] = COMPOSE["services"]


def known_variables() -> set[str]:
    names = {f"UELLM_{name}" for name in CLIENT_VARIABLES}
    names |= {f"UELLM_{name.upper()}" for name in ServiceSettings.model_fields}
    for role in ROLES:
        for value in vars(importlib.import_module(f"uellm_{role}.settings")).values():
            if isinstance(value, type) and issubclass(value, ServiceSettings) and value.role:
                names |= {f"UELLM_{role.upper()}_{name.upper()}" for name in value.model_fields}
    return names


def test_there_is_the_whole_mesh_and_no_more() -> None:
    assert set(SERVICES) == {*ROLES, "redis", "jaeger"}


@pytest.mark.parametrize("role", ROLES)
def test_each_role_is_an_image_of_its_own(role: str) -> None:
    service = SERVICES[role]
    assert service["build"]["args"]["ROLE"] == role
    assert "command" not in service, "the image's"
    assert service["healthcheck"]["test"][:4] == ["CMD", "uellm", "health", "--address"]
    assert service["depends_on"] == {"redis": {"condition": "service_healthy"}}
    assert service["volumes"] == ["./uellm/demo/model:/models/demo:ro"]
    assert (ROOT / "uellm" / "demo" / "model" / "config.json").is_file()


@pytest.mark.parametrize("role", ROLES)
def test_each_role_is_an_extra(role: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert role in project["optional-dependencies"]


def test_the_image_is_what_uellm_serve_runs_as_a_user() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert any('".[${ROLE' in line for line in lines)
    assert lines[-1] == r'CMD ["sh", "-c", "exec uellm serve \"$ROLE\""]'
    assert lines.index("USER uellm") > max(
        index for index, line in enumerate(lines) if line.startswith(("RUN", "COPY"))
    )


def test_the_build_is_given_what_the_dockerfile_copies() -> None:
    given = (ROOT / ".dockerignore").read_text().splitlines()
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert source == "." or f"!{source.split('/')[0]}" in given, source


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_every_variable_is_a_setting(name: str) -> None:
    known = known_variables()
    for service in load(name)["services"].values():
        for variable in service.get("environment", {}):
            assert variable in known or FOREIGN.fullmatch(variable), variable


def test_workers_can_be_scaled() -> None:
    worker = SERVICES["worker"]
    assert not {"ports", "container_name", "hostname"} & set(worker)
    assert "UELLM_SERVICE_ID" not in worker["environment"]


def test_nothing_is_reachable_from_other_hosts() -> None:
    for service in SERVICES.values():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")


def test_redis_keeps_what_it_accepted() -> None:
    command = SERVICES["redis"]["command"]
    for option in ("--appendonly yes", "--maxmemory-policy noeviction"):
        assert option in command


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_old_compose_takes_it(name: str) -> None:
    content = load(name)
    assert not TOO_NEW & set(content)
    for service in content["services"].values():
        assert not TOO_NEW & set(service)
        assert "start_interval" not in service.get("healthcheck", {})
