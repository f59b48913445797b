"""Continuous execution in the engine by an order: admit while slots and KV room last.

A policy of this kind is its order. As in vLLM, a sequence is admitted when the KV room of what is
known of it is there, and a watermark besides, so that the running ones can grow a little; when
room runs out nevertheless, who comes last in the order is preempted and recomputed. Nothing is
admitted beyond one that does not fit.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import ceil

from uellm.core.cost import StepCost
from uellm.core.settings import Settings, setting
from uellm.policy.occupancy import free_tokens, held_tokens, victims
from uellm.policy.views import EngineView, SequenceView, StepDecision

Key = tuple[float, ...]


@dataclass(frozen=True)
class OrderedSettings(Settings):
    """Settings of the policies that are an order."""

    watermark: float = setting(
        0.05, "Share of the KV room that an admission leaves free.", least=0, most=0.9
    )
    knee_factor: float = setting(
        0.0,
        "Most sequences at once, in multiples of the knee: the batch from which on arithmetic, not "
        "reading the weights, sets the pace. 0: as many as there are slots.",
        least=0,
    )
    max_wait_seconds: float = setting(
        600.0, "Requests that have waited longer go first, by arrival.", above=0
    )


def batch_cap(slots: int, cost: StepCost | None, knee_factor: float) -> int:
    """Most sequences at once: so many times what pays, as far as there are slots."""
    if cost is None or not knee_factor:
        return slots
    return min(slots, max(1, ceil(cost.worthwhile * knee_factor)))


class OrderedStep(ABC):
    """A step policy that is an order."""

    name: str
    settings_type = OrderedSettings

    def __init__(self, settings: OrderedSettings | None = None) -> None:
        self._settings = settings or OrderedSettings()

    @abstractmethod
    def key(self, sequence: SequenceView, now: float) -> Key:
        """The least is first."""

    def step(self, engine: EngineView, now: float) -> StepDecision:
        """See ``uellm.policy.views.StepPolicy``."""

        def place(sequence: SequenceView) -> Key:
            arrival = (sequence.arrived_at, float(sequence.rank))
            if now - sequence.slo.accepted_at > self._settings.max_wait_seconds:
                return (0.0, sequence.slo.accepted_at, *arrival)
            return (1.0, *self.key(sequence, now), *arrival)

        preempt = victims(engine, lambda s: tuple(-x for x in place(s)))
        if preempt:
            return StepDecision(preempt=preempt, chunk_tokens=engine.max_chunk_tokens)
        cap = batch_cap(engine.slots, engine.cost, self._settings.knee_factor)
        places = cap - len(engine.running)
        spare = self._settings.watermark * engine.kv_tokens_total
        free = free_tokens(engine)
        reserve: dict[str, int] = {}
        missing: int | None = None
        for sequence in sorted(engine.waiting, key=place) if places > 0 else ():
            if len(reserve) == places:
                break
            need = held_tokens(sequence, engine.block_tokens)
            if need + spare > free and (engine.running or reserve):
                missing = ceil(need + spare)
                break
            reserve[sequence.request_id] = held_tokens(sequence)
            free -= need
        return StepDecision(
            admit=tuple(reserve),
            chunk_tokens=engine.max_chunk_tokens,
            reconsider_when=missing,
            reserve=reserve,
        )
