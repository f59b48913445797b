"""What a worker is told."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from uellm.config import ServiceSettings
from uellm.mesh.state import home
from uellm.policy.registry import DEFAULT_POLICY


class WorkerSettings(ServiceSettings):
    """Settings of a worker: UELLM_WORKER_*, or [worker] in the file."""

    role: ClassVar[str] = "worker"

    engine: Literal["shard", "instant"] = Field(
        "shard",
        description="shard: real models; instant: tokens that depend on seed and position alone, "
        "for tests and measurements of everything else.",
    )
    devices: str = Field(
        "auto",
        description="auto: all CUDA devices, else the CPU; or a list such as cuda:0,cuda:1 or cpu. "
        "Another accelerator that torch drives as xpu:0, ROCm's as cuda:0, and with its memory "
        "where torch does not say it: mps:0:memory=16GiB. Devices that the CPU plays, for trying "
        "placements, as sim:0-3:memory=4GiB, with :flops=1e12:bandwidth=1e11 for planners and "
        ":paced for steps that take as long.",
    )
    threads: int = Field(
        0,
        ge=0,
        description="Threads that each child may compute with; 0: the cores that affinity and "
        "control group grant, shared by the stages that are here when a child loads.",
    )
    memory_bytes: int = Field(
        0,
        ge=0,
        description="Memory that the CPU device offers; 0: half of what is available at the start, "
        "divided among the workers of the host.",
    )
    rack: str = Field(
        "",
        description="Where the host stands: hosts of one rack are taken to be nearer to each other "
        "than to others, until links are measured.",
    )
    data_host: str = Field(
        "",
        description="Address that activations travel by, bound and announced; empty: the "
        "advertised host. Keep it private: whoever reaches it can take part.",
    )
    allow_download: bool = Field(
        False,
        description="Fetch from the hub a model that is placed here, if neither this host nor "
        "another worker has it.",
    )
    cache_directory: str = Field(
        "",
        description="Where model files are kept that came from other workers; empty: models below "
        "UELLM_HOME. Workers of a host may share it.",
    )
    cache_bytes: int = Field(
        0,
        ge=0,
        description="What these files may take; those that were not used for the longest time go "
        "first. 0: what the disk has, but for 256 MiB.",
    )
    uploads: int = Field(
        2,
        ge=0,
        description="Workers that are sent model files at the same time; others wait. 0: none is.",
    )
    step_policy: str = Field(
        DEFAULT_POLICY,
        description="Step policy of the engines led here, where none was chosen for the model "
        "while running: one of `uellm policy list`.",
    )
    record_every_steps: int = Field(
        64,
        ge=0,
        description="Every so many steps of an engine led here the decision of its policy is "
        "recorded, and besides each that lets in who had waited, preempts or hands back; 0: none "
        "is.",
    )
    execution: Literal["continuous", "static"] = Field(
        "continuous",
        description="How the engines led here compose steps. static: padded batches that last as "
        "long as their longest answer, to compare with.",
    )
    append_interval_seconds: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Least time between two appends of a replica, first tokens and ends excepted; "
        "0: one as soon as the last returned.",
    )
    instant_step_seconds: float = Field(
        0.0, ge=0, description="What each step of the instant engine is made to take."
    )

    @property
    def data_address(self) -> str:
        """Address that activations travel by."""
        return self.data_host or self.advertised_host

    @property
    def cache_path(self) -> Path:
        """Where files of other workers are kept."""
        named = self.cache_directory
        return Path(named).expanduser().absolute() if named else home() / "models"
