"""What a deployer is told."""

import json
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from uellm.config import ServiceSettings
from uellm.core.errors import ConfigurationError, InvalidArgumentError
from uellm.placement.demand import Targets
from uellm.placement.placers import placer_of
from uellm.topology_file import read_topology
from uellm.v1 import topology_pb2


class DeployerSettings(ServiceSettings):
    """Settings of a deployer."""

    role: ClassVar[str] = "deployer"

    models: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Models served from the start, separated by commas: NAME=SOURCE, or a "
        "directory or hub id whose last part is the name. What was deployed or undeployed since "
        "then counts after a restart, until these settings say something else.",
    )
    adapters: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="LoRA adapters of these models in peft's format, separated by commas: "
        "NAME=SOURCE, or MODEL:NAME=SOURCE where there are several models.",
    )
    replicas: int = Field(
        1, ge=1, description="Copies of each of them; with the objective goodput the fewest."
    )
    stages: int = Field(
        0, ge=0, description="Stages per copy; 0: as many as the objective is best with."
    )
    objective: str = Field(
        "helr",
        description="What placements seek unless a request says: helr, the fewest devices that "
        "keep the SLO; he, the fewest that fit; lr, the least latency; throughput; goodput, as "
        "many copies as the load needs; even, equal shares; or one that an installed package "
        "offers.",
    )
    slots: int = Field(
        8, ge=1, description="Most sequences that run at once per copy, unless a request says."
    )
    max_tokens: int = Field(0, ge=0, description="Longest context granted; 0: the model's.")
    kv_tokens: int = Field(
        0,
        ge=0,
        description="KV room per copy, in tokens of all sequences together; 0: the longest "
        "context for every slot.",
    )
    dtype: Literal["", "float32", "bfloat16", "float16"] = Field(
        "", description="Compute dtype; empty: float32 where a CPU is used, bfloat16 elsewhere."
    )
    allow_download: bool = Field(
        False, description="Fetch models that the local hub cache lacks from the hub."
    )
    settle_seconds: float = Field(
        10.0,
        ge=0,
        description="How long to wait for as many devices as are wanted before a model is first "
        "placed on those that are there.",
    )
    recovery_seconds: float = Field(
        1.5,
        ge=0,
        description="How long to wait for a lost worker to come back before its layers are placed "
        "elsewhere.",
    )
    worker_silence_seconds: float = Field(
        3.0, gt=0, description="A worker that was not heard of for so long counts as lost."
    )
    topology_file: str = Field(
        "",
        description="YAML or JSON that completes what is discovered of devices and links, and "
        "counts instead of it; see docs/topology.md.",
    )
    probe_seconds: float = Field(
        5.0,
        ge=0,
        description="Longest time that placing a model waits for measurements of workers that are "
        "new and idle, where devices or hosts differ; 0: they are made only on request.",
    )
    probe_age_seconds: float = Field(
        86400.0, gt=0, description="Measurements that are older are made anew before a placement."
    )
    replan_gain: float = Field(
        0.05,
        gt=0,
        le=1,
        description="Share of time or cost that a better placement must gain for a replica that "
        "serves to be placed anew.",
    )
    replan_cooldown_seconds: float = Field(
        60.0, ge=0, description="How long a replica stays where it is before it is placed anew."
    )
    replan_seconds: float = Field(
        5.0, gt=0, description="How often better placements are looked for, at most."
    )
    utilisation: float = Field(
        0.8,
        gt=0,
        le=1,
        description="With the objective goodput: share of what replicas do that the offered load "
        "may take before there is one more.",
    )
    attainment: float = Field(
        0.9,
        gt=0,
        le=1,
        description="With the objective goodput: share of the requests that ask for a time which "
        "are to be in time; where fewer are and requests wait, replicas are taken to do less.",
    )
    keep_seconds: float = Field(
        300.0,
        ge=0,
        description="With the objective goodput: how long a replica is kept that the load does not "
        "need any more, unless another model lacks it.",
    )
    approve: bool = Field(
        False,
        description="Better placements are proposed, and carried out on `uellm deploy --approve "
        "NAME`.",
    )
    load_seconds: float = Field(1800.0, gt=0, description="Longest time that loading may take.")
    join_seconds: float = Field(
        60.0, gt=0, description="Longest time that joining the stages of a replica may take."
    )
    undeploy_seconds: float = Field(
        30.0, ge=0, description="Longest time that running answers of a removed model are given."
    )

    @field_validator("objective")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            placer_of(value)
        except InvalidArgumentError as error:
            raise ValueError(error.message) from None
        return value

    @property
    def targets(self) -> Targets:
        """What the objective goodput aims at."""
        return Targets(self.utilisation, self.attainment, self.keep_seconds)

    @property
    def said_topology(self) -> topology_pb2.Topology:
        """What the topology file says; nothing without one.

        Raises:
            ConfigurationError: if it cannot be read.
        """
        if not self.topology_file:
            return topology_pb2.Topology()
        try:
            return read_topology(Path(self.topology_file))
        except InvalidArgumentError as error:
            raise ConfigurationError(
                f"UELLM_DEPLOYER_TOPOLOGY_FILE: {error.message}", field="topology_file"
            ) from None

    @field_validator("models", "adapters", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("["):
            return json.loads(value)
        return tuple(part.strip() for part in value.split(",") if part.strip())
