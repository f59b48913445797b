"""The control plane installs without the model libraries."""

import re
from importlib.metadata import PackageNotFoundError, distribution, requires

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

MODEL_LIBRARIES = {"torch", "transformers", "accelerate", "peft", "safetensors"}


def closure(name: str, extras: frozenset[str]) -> set[str]:
    """Every distribution that installing ``name[extras]`` brings, by installed metadata."""
    found: set[str] = set()
    pending = [(canonicalize_name(name), extras)]
    seen = set()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        project, wanted = current
        found.add(project)
        try:
            lines = requires(project) or []
        except PackageNotFoundError:
            continue
        for line in lines:
            requirement = Requirement(line)
            environments = [{"extra": extra} for extra in wanted or {""}]
            if requirement.marker is None or any(
                requirement.marker.evaluate(environment) for environment in environments
            ):
                pending.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return found


@pytest.mark.parametrize("role", ["gateway", "profiler", "scheduler", "deployer"])
def test_control_plane_installs_without_model_libraries(role: str) -> None:
    brought = closure("uellm", frozenset({role}))
    assert "grpcio" in brought
    assert not brought & MODEL_LIBRARIES


def test_worker_brings_them() -> None:
    assert closure("uellm", frozenset({"worker"})) >= MODEL_LIBRARIES


def test_all_extras_are_known() -> None:
    extras = set(distribution("uellm").metadata.get_all("Provides-Extra") or [])
    assert {"gateway", "profiler", "scheduler", "deployer", "worker", "embedded", "all"} <= extras
    assert all(re.fullmatch(r"[a-z-]+", extra) for extra in extras)
