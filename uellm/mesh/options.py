"""What a mesh on one host consists of, before anything of it runs."""

import os
import re
import socket
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from uellm.core.errors import ConfigurationError
from uellm.mesh.supervision import ServiceSpec
from uellm.models.adapters import check_names, parse_adapter
from uellm.v1 import common_pb2, deployer_pb2

DEMO_MODEL = Path(__file__).parent.parent / "demo" / "model"
DRAIN_ORDER = ("gateway", "scheduler", "profiler", "worker", "deployer")
_NAMED = re.compile(r"(?:(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)=)?(?P<source>.+)")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model to serve.

    Attributes:
        name: the name it is served under.
        source: directory or hub id.
        adapters: its LoRA adapters.
    """

    name: str
    source: str
    adapters: tuple[common_pb2.ModelRef, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """``SOURCE`` or ``NAME=SOURCE``; a directory's name, or the hub id, names the model.

        Raises:
            ConfigurationError: if it is empty.
        """
        match = _NAMED.fullmatch(text.strip())
        if match is None:
            raise ConfigurationError(
                "--model is empty; name a directory or a hub id (org/name)", field="model"
            )
        source = match["source"]
        directory = Path(source).expanduser()
        # What looks like a path is no hub id: that it is not there is said where it is read.
        if directory.is_dir() or source.startswith(("/", "./", "../", "~")):
            source = str(directory.resolve())
            return cls(
                match["name"] or re.sub(r"[^A-Za-z0-9._-]", "-", directory.resolve().name), source
            )
        return cls(match["name"] or source, source)


def parse_models(texts: Iterable[str]) -> list[ModelSource]:
    """The models to serve, each ``SOURCE`` or ``NAME=SOURCE``.

    Raises:
        ConfigurationError: if one is empty, or two would be served under one name.
    """
    found: dict[str, ModelSource] = {}
    for model in map(ModelSource.parse, texts):
        if model.name in found:
            raise ConfigurationError(
                f"--model: {found[model.name].source} and {model.source} would both be served as "
                f"{model.name!r}; name one of them with --model NAME=SOURCE, or ask for copies of "
                "one model with --replicas",
                field="model",
            )
        found[model.name] = model
    return list(found.values())


def with_adapters(models: Sequence[ModelSource], adapters: Sequence[str]) -> list[ModelSource]:
    """Models with their LoRA adapters, each ``NAME=SOURCE`` or ``MODEL:NAME=SOURCE``.

    Raises:
        InvalidArgumentError: if one cannot be read, or a name stands twice.
        ConfigurationError: if it is not said to which model one belongs.
    """
    by_name: dict[str, list[common_pb2.ModelRef]] = {model.name: [] for model in models}
    for text in adapters:
        name, ref = parse_adapter(text)
        name = name or (models[0].name if len(models) == 1 else "")
        if name not in by_name:
            raise ConfigurationError(
                f"--adapter {text}: put the model that it belongs to before it, as "
                f"MODEL:NAME=SOURCE; served are: {', '.join(by_name)}",
                field="adapter",
            )
        by_name[name].append(ref)
    return [replace(model, adapters=tuple(check_names(by_name[model.name]))) for model in models]


@dataclass(frozen=True, slots=True)
class MeshOptions:
    """A mesh on one host.

    Attributes:
        models: what to serve.
        workers: how many worker processes.
        devices: what each worker may use, as UELLM_WORKER_DEVICES takes it; "": all it finds.
        stages: stages per replica; 0: as many as the objective is best with.
        replicas: copies of each model; with the objective goodput the fewest.
        objective: what placements seek; "": as the deployer is set.
        dtype: compute dtype; "": float32 on CPU, bfloat16 elsewhere.
        slots: most sequences at once per replica; 0: the default.
        max_tokens: longest context granted; 0: the model's.
        kv_tokens: KV room per replica, of all sequences together; 0: all slots full.
        host: address that all services bind to.
        listens: its own Redis is at that address too, behind a password: other hosts may join.
        port: port of the gateway.
        redis_url: Redis to use; "": one of its own.
        traced: whether every service writes its spans, to the mesh's trace directory.
    """

    models: tuple[ModelSource, ...]
    workers: int = 1
    devices: str = ""
    stages: int = 0
    replicas: int = 1
    objective: str = ""
    dtype: str = ""
    slots: int = 0
    max_tokens: int = 0
    kv_tokens: int = 0
    host: str = "127.0.0.1"
    listens: bool = False
    port: int = 0
    redis_url: str = ""
    traced: bool = False

    def plan_request(self, model: ModelSource) -> deployer_pb2.PlanRequest:
        """What the deployer is asked to place."""
        return deployer_pb2.PlanRequest(
            model=common_pb2.ModelRef(name=model.name, source=model.source),
            replicas=self.replicas,
            objective=self.objective,
            stages=self.stages,
            dtype=self.dtype,
            slots=self.slots,
            max_tokens=self.max_tokens,
            kv_tokens=self.kv_tokens,
            adapters=model.adapters,
        )

    def services(
        self,
        redis_url: str,
        logs: Path,
        traces: Path,
        inherited: Mapping[str, str] = os.environ,
    ) -> list[ServiceSpec]:
        """Every service of the mesh, in the order in which they are drained.

        Args:
            redis_url: the mesh's Redis.
            logs: where their logs go.
            traces: where their spans go, if they write any.
            inherited: environment that they start from; settings in it reach the services.
        """
        # A Redis that other hosts share must tell their services from this host's.
        suffix = f"-{socket.gethostname()}" if self.redis_url or self.listens else ""
        specs = []
        for role in DRAIN_ORDER:
            for number in range(1, (self.workers if role == "worker" else 1) + 1):
                service_id = f"{role}{suffix}-{number}"
                specs.append(
                    ServiceSpec(
                        service_id=service_id,
                        role=role,
                        command=(sys.executable, "-m", f"uellm_{role}"),
                        log=logs / f"{service_id}.log",
                        environment={
                            **inherited,
                            **self._settings(role, service_id, redis_url, traces),
                        },
                    )
                )
        return specs

    def _settings(self, role: str, service_id: str, redis_url: str, traces: Path) -> dict[str, str]:
        settings = {
            "UELLM_REDIS_URL": redis_url,
            "UELLM_HOST": self.host,
            f"UELLM_{role.upper()}_SERVICE_ID": service_id,
        }
        if role == "gateway":
            settings["UELLM_GATEWAY_PORT"] = str(self.port)
        if role == "worker" and self.devices:
            settings["UELLM_WORKER_DEVICES"] = self.devices
        if self.traced:
            settings["UELLM_OTEL_EXPORTER"] = "console"
            settings["UELLM_OTEL_FILE"] = str(traces / f"{service_id}.jsonl")
        return settings
