"""What a placer may look at, and what it decides."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from uellm.core.model import ModelProfile


@dataclass(frozen=True, slots=True)
class Device:
    """Something that can hold layers.

    Attributes:
        id: unique in the mesh: ``<worker>/<kind>:<index>``.
        worker: the worker it belongs to.
        host: the host the worker runs on.
        kind: cpu, cuda, other or simulated.
        memory_bytes: what a plan may fill: free now, or held by what the plan replaces.
        num_stages: stages of other replicas that it holds; those with fewer come first.
        flops_per_second: sustained; 0: not measured.
        memory_bytes_per_second: sustained; 0: not measured.
    """

    id: str
    worker: str
    host: str
    kind: str
    memory_bytes: int
    num_stages: int = 0
    flops_per_second: float = 0.0
    memory_bytes_per_second: float = 0.0


@dataclass(frozen=True, slots=True)
class Workload:
    """What is wanted of a deployment.

    Attributes:
        replicas: whole copies.
        stages: stages per copy; 0: as few as fit.
        slots: most sequences that run at once per copy; a plan may grant fewer.
        max_tokens: longest context; 0: the model's.
    """

    replicas: int = 1
    stages: int = 0
    slots: int = 8
    max_tokens: int = 0


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """Consecutive layers on a device.

    Attributes:
        device_id: where.
        first_layer: inclusive.
        last_layer: inclusive.
        has_embed: holds the embedding.
        has_head: holds final norm and head.
        memory_bytes: weights, KV cache and workspace.
        kv_bytes: KV cache and recurrent states alone.
    """

    device_id: str
    first_layer: int
    last_layer: int
    has_embed: bool
    has_head: bool
    memory_bytes: int
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class PlannedReplica:
    """One whole copy, in stage order."""

    stages: tuple[PlannedStage, ...]


@dataclass(frozen=True, slots=True)
class PlacementPlan:
    """Where a model goes.

    Attributes:
        replicas: the copies that fit; fewer than wanted if there is an infeasible_reason.
        slots: most sequences that run at once per copy.
        max_tokens: longest context granted.
        objective: what was sought.
        explanation: why it looks like this, in plain words.
        infeasible_reason: what is missing, and the nearest choice that fits; "" if nothing is.
    """

    replicas: tuple[PlannedReplica, ...]
    slots: int
    max_tokens: int
    objective: str
    explanation: str
    infeasible_reason: str = ""


class Placer(Protocol):
    """Decides where layers go. Implementations hold settings, never state."""

    @property
    def name(self) -> str:
        """As plans show it."""
        ...

    def place(
        self,
        devices: Sequence[Device],
        model: ModelProfile,
        workload: Workload,
        previous: PlacementPlan | None = None,
    ) -> PlacementPlan:
        """Plan. Pure and deterministic; ``previous`` is what the plan moves as little of as it can.

        Args:
            devices: those that may be used.
            model: what is to be placed, in the compute dtype.
            workload: what is wanted.
            previous: where it is now; its devices need not be there any more.
        """
        ...
