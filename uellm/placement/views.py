"""What a placer is asked, and what it decides."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal, Protocol

from uellm.core.errors import InvalidArgumentError
from uellm.core.model import ModelProfile
from uellm.placement.budget import Clock
from uellm.placement.topology import Topology

Objective = Literal["helr", "he", "lr", "throughput", "goodput"]
OBJECTIVES: tuple[Objective, ...] = ("helr", "he", "lr", "throughput", "goodput")

Routing = Literal["chain", "full_stage"]
"""Each stage on one worker, as replicas run; or on several devices, as in Helix: to plan only."""
ROUTINGS: tuple[Routing, ...] = ("chain", "full_stage")


@dataclass(frozen=True, slots=True)
class Workload:
    """What is wanted of a deployment, and the load that it is for.

    A plan's KV cache is for ``batch * in_flight`` sequences of ``prompt_tokens + output_tokens``
    where the load is described (``batch`` above 0), else for ``slots`` of ``max_tokens``, of which
    it may grant fewer.

    Attributes:
        replicas: whole copies; as many as pay for the objective ``goodput``.
        stages: stages per copy; 0: as few as fit, or as many as the objective is best with.
        slots: most sequences that run at once per copy; a plan may grant fewer.
        max_tokens: longest context; 0: the model's.
        kv_tokens: KV room per copy, of all sequences together; 0: the longest context for every
            slot. Less lets more sequences run than could all be of the longest context.
        batch: sequences that are computed together; 0: each batch in flight has its share of slots.
        prompt_tokens: of a request.
        output_tokens: of a request: the 90 % quantile that profilers predict.
        in_flight: batches that are under way at once, each on another stage.
        requests_per_second: offered to all copies together; 0: not known, as many as can be served.
        slo_seconds: longest time that a batch may take from prompt to last token; 0: none.
    """

    replicas: int = 1
    stages: int = 0
    slots: int = 8
    max_tokens: int = 0
    kv_tokens: int = 0
    batch: int = 0
    prompt_tokens: int = 512
    output_tokens: int = 128
    in_flight: int = 1
    requests_per_second: float = 0.0
    slo_seconds: float = 0.0

    def __post_init__(self) -> None:
        for name in (
            *("replicas", "stages", "slots", "max_tokens", "kv_tokens", "batch"),
            "requests_per_second",
        ):
            if not getattr(self, name) >= 0:
                _refuse(name, f"{getattr(self, name)} is negative; use 0 for the default")
        for name in ("prompt_tokens", "output_tokens", "in_flight"):
            if not getattr(self, name) >= 1:
                _refuse(name, f"{getattr(self, name)} is not at least 1")
        if not self.slo_seconds >= 0:
            _refuse("slo_seconds", f"{self.slo_seconds} is negative; use 0 for none")
        for name in ("requests_per_second", "slo_seconds"):
            if not isfinite(getattr(self, name)):
                _refuse(name, f"{getattr(self, name)} is not finite; use 0 for none")


def _refuse(name: str, problem: str) -> None:
    raise InvalidArgumentError(f"workload.{name}: {problem}", field=f"workload.{name}")


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """What one layer takes on a device, measured: (tokens in the batch, seconds), by tokens.

    Attributes:
        prefill: prompts, tokens of all sequences together.
        decode: one step, one token of each sequence.
        stage: seconds of any step on the device, whatever layers it has.
        ends: embedding, head and the choosing of tokens, by sequences; empty: not measured.
        leader: seconds between two steps on the first device.
        agent: seconds of a step that computing there loses to the leader's agent.
        share: of the time that a quota lets the device compute; all seconds here count the rest.
        period: of the quota, in seconds.
    """

    prefill: tuple[tuple[float, float], ...]
    decode: tuple[tuple[float, float], ...]
    stage: float = 0.0
    ends: tuple[tuple[float, float], ...] = ()
    leader: float = 0.0
    agent: float = 0.0
    share: float = 1.0
    period: float = 0.0


@dataclass(frozen=True, slots=True)
class Pin:
    """A device that a plan must use.

    Attributes:
        device_id: which.
        end: where in a replica's order; "any" for anywhere.
    """

    device_id: str
    end: Literal["any", "first", "last"] = "any"


@dataclass(frozen=True, slots=True)
class LayerPin:
    """Layers that must be on certain devices; layers inclusive.

    Attributes:
        name: a device, a worker or a host.
    """

    name: str
    first_layer: int
    last_layer: int


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
        prefill_seconds: predicted, for a batch's prompts.
        decode_seconds: predicted, for one step of a batch.
        send_seconds: predicted, for one step's activations to the next stage.
    """

    device_id: str
    first_layer: int
    last_layer: int
    has_embed: bool
    has_head: bool
    memory_bytes: int
    kv_bytes: int
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    send_seconds: float = 0.0


IN_FLIGHT = "in_flight"
"""Sets the pace of a replica that could take more batches at once than it is given."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """How fast a replica is expected to be, with batches of the workload.

    Attributes:
        prefill_seconds: from prompt to first token, links included.
        decode_seconds: one step through all stages, links included.
        total_seconds: from prompt to last token.
        bottleneck_seconds: the least time between the ends of two batches.
        bottleneck: what sets it: a device, a link as "a -> b", or ``IN_FLIGHT``.
        tokens_per_second: output tokens, all batches in flight, prompts in between.
    """

    prefill_seconds: float
    decode_seconds: float
    total_seconds: float
    bottleneck_seconds: float
    bottleneck: str
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class PlannedReplica:
    """One whole copy, in stage order; ``prediction`` is None where speed was not looked at."""

    stages: tuple[PlannedStage, ...]
    prediction: Prediction | None = None


@dataclass(frozen=True, slots=True)
class Certificate:
    """How far a plan is from the best one there can be.

    Attributes:
        quantity: what is compared: seconds, cost, or tokens per second.
        value: the plan's.
        bound: no plan can be better than this.
        proof: what the bound rests on, in a few words.
    """

    quantity: Literal["seconds", "cost", "tokens per second"]
    value: float
    bound: float
    proof: str

    @property
    def ratio(self) -> float:
        """1 for a plan that is proven to be the best; never below."""
        worse, better = (
            (self.bound, self.value)
            if self.quantity == "tokens per second"
            else (self.value, self.bound)
        )
        if worse <= better:
            return 1.0
        return worse / better if better > 0 else float("inf")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan that was looked at and not chosen.

    Attributes:
        name: a baseline, or the best of so many devices.
        device_ids: in stage order.
        num_layers: per stage.
        total_seconds: predicted, from prompt to last token; inf if it does not fit.
        tokens_per_second: predicted; 0 if it does not fit.
        ruled_out: the constraint or objective that speaks against it.
    """

    name: str
    device_ids: tuple[str, ...]
    num_layers: tuple[int, ...]
    total_seconds: float
    tokens_per_second: float
    ruled_out: str


@dataclass(frozen=True, slots=True)
class Move:
    """Layers that a device has to load which it did not hold before.

    Attributes:
        replica: index.
        device_id: which loads.
        first_layer: inclusive.
        last_layer: inclusive.
        weight_bytes: of these layers.
    """

    replica: int
    device_id: str
    first_layer: int
    last_layer: int
    weight_bytes: int


@dataclass(frozen=True, slots=True)
class SharedStage:
    """Layers that several devices hold, each for a share of the tokens; layers inclusive."""

    device_ids: tuple[str, ...]
    first_layer: int
    last_layer: int


@dataclass(frozen=True, slots=True)
class FullStage:
    """Stages of several devices each.

    Attributes:
        stages: in order.
        tokens_per_second: the maximum flow through them.
        chain_tokens_per_second: of disjoint chains on the same devices, links counted.
    """

    stages: tuple[SharedStage, ...]
    tokens_per_second: float
    chain_tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Where a model goes.

    Attributes:
        replicas: the copies that fit; fewer than wanted if there is an infeasible_reason.
        slots: most sequences that run at once per copy.
        max_tokens: longest context granted.
        objective: what was sought.
        explanation: why it looks like this, in plain words.
        infeasible_reason: what is missing, and the nearest choice that fits; "" if nothing is.
        kv_tokens: KV room per copy, in tokens of all sequences together.
        certificate: how good it is at least; None where nothing was optimised.
        solver: what found it.
        solve_seconds: how long that took, as measured by whoever asked; 0: not measured.
        candidates: what else was looked at, the best first.
        moves: what differs from the previous plan.
        full_stage: how far stages of several devices would come, if that was asked for.
        budget_exhausted: the search ended with its budget, and not done; its bound holds.
        slo_missed: it takes longer than the SLO, which ``he`` and ``lr`` do not look at.
    """

    replicas: tuple[PlannedReplica, ...]
    slots: int
    max_tokens: int
    objective: str
    explanation: str
    infeasible_reason: str = ""
    kv_tokens: int = 0
    certificate: Certificate | None = None
    solver: str = ""
    solve_seconds: float = 0.0
    candidates: tuple[Candidate, ...] = ()
    moves: tuple[Move, ...] = ()
    full_stage: FullStage | None = None
    budget_exhausted: bool = False
    slo_missed: bool = False


@dataclass(frozen=True, slots=True)
class Stock:
    """What there is of a model's files.

    Attributes:
        needs: the parts of the model that a stage needs, and their bytes, by name.
        held: by worker, the parts that its host has; workers that are not named have all.
    """

    needs: Callable[[PlannedStage], Mapping[str, int]]
    held: Mapping[str, frozenset[str]]

    def lacking(self, stage: PlannedStage, worker: str) -> int:
        """Bytes that a worker would have to fetch for a stage."""
        if worker not in self.held:
            return 0
        held = self.held[worker]
        return sum(amount for name, amount in self.needs(stage).items() if name not in held)


EVERYWHERE = Stock(lambda stage: {}, {})
"""All hosts have all files."""


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What to place, where, and what to look for.

    Attributes:
        topology: what there is.
        model: what is to be placed, in the compute dtype.
        workload: what is wanted.
        objective: ``lr``: least latency; ``he``: least cost, which counts devices unless told
            otherwise; ``helr``: least cost whose latency keeps the SLO; ``throughput``: most tokens
            per second of each replica; ``goodput``: of as many replicas as pay, SLO kept.
        previous: where it is now; its devices need not be there any more.
        move_seconds_per_byte: price of loading weights; 0: a plan may move all.
        pins: devices that must be used.
        layer_pins: layers that must be on certain devices; of one copy, without ``pins``.
        excluded: ids of devices, workers or hosts that must not be.
        costs: by id of device, instead of the device's own.
        layer_times: measured, by device id or else device name; they override FLOP/s and bandwidth.
        budget_seconds: time to search where no exact method is fast enough; see ``Budget``.
        clock: what ends it besides work; None: nothing, so that equal requests have equal plans.
        seeded: whether baselines are where the search starts; off to compare with them.
        stock: which hosts have the model's files; placers take those of devices that are alike.
        routing: ``full_stage``: say besides how far stages of several devices would come.
    """

    topology: Topology
    model: ModelProfile
    workload: Workload = field(default_factory=Workload)
    objective: Objective = "helr"
    previous: Plan | None = None
    move_seconds_per_byte: float = 0.0
    pins: tuple[Pin, ...] = ()
    layer_pins: tuple[LayerPin, ...] = ()
    excluded: frozenset[str] = frozenset()
    costs: Mapping[str, float] = field(default_factory=dict)
    layer_times: Mapping[str, LayerTimes] = field(default_factory=dict)
    budget_seconds: float = 5.0
    clock: Clock | None = None
    seeded: bool = True
    stock: Stock = EVERYWHERE
    routing: Routing = "chain"


class Placer(Protocol):
    """Decides where layers go. Implementations hold settings, never state."""

    @property
    def name(self) -> str:
        """As plans show it."""
        ...

    def place(self, request: PlanRequest) -> Plan:
        """Plan. Pure and deterministic; moves as little of ``request.previous`` as it can."""
        ...
