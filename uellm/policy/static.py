"""Static execution in the engine: a batch is admitted when nothing runs, and runs to its end."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

import numpy as np

from uellm.core.cost import StepCost
from uellm.core.settings import Settings, setting
from uellm.policy.batching import (
    Batch,
    Candidate,
    OdbsSettings,
    Room,
    coded_slo_odbs,
    fifo,
    overdue_first,
    s3,
    slo_odbs,
)
from uellm.policy.columns import Columns, Floats
from uellm.policy.due import slo_seconds
from uellm.policy.occupancy import victims
from uellm.policy.stress import MorphlingSettings, best_batch
from uellm.policy.views import EngineView, SequenceView, StepDecision

_MAX_WAIT = setting(
    600.0, "Once a request has waited longer than this, its batch runs first.", above=0
)


class Batching(ABC):
    """A batcher with its settings, for both levels.

    Attributes:
        name: its policy's.
        settings_type: what it is made with.
        max_wait_seconds: once a request has waited longer than this, its batch runs first.
    """

    name: str
    settings_type: type[Settings]
    max_wait_seconds: float = inf

    @abstractmethod
    def parted(
        self, candidates: Sequence[Candidate], room: Room, cost: StepCost | None
    ) -> list[Batch]:
        """Batches, the first to run first."""

    def keys(self, columns: Columns) -> tuple[Floats, ...]:
        """By what a long queue is ordered before its first requests are looked at."""
        return (columns.accepted,)

    def batches(
        self, candidates: Sequence[Candidate], room: Room, cost: StepCost | None, now: float
    ) -> list[Batch]:
        """The same, but nobody waits for ever."""
        return overdue_first(self.parted(candidates, room, cost), now, self.max_wait_seconds)


@dataclass(frozen=True)
class SloOdbsSettings(OdbsSettings):
    """Settings of the three algorithms of the paper."""

    max_wait_seconds: float = _MAX_WAIT


class SloOdbs(Batching):
    """SLO-ODBS, balanced; see ``uellm.policy.batching.slo_odbs``."""

    name = "slo-odbs"
    settings_type = SloOdbsSettings

    def __init__(self, settings: SloOdbsSettings | None = None) -> None:
        self._settings = self._weighted(settings or SloOdbsSettings())
        self.max_wait_seconds = self._settings.max_wait_seconds

    def _weighted(self, settings: SloOdbsSettings) -> SloOdbsSettings:
        return settings

    def parted(
        self, candidates: Sequence[Candidate], room: Room, cost: StepCost | None
    ) -> list[Batch]:
        """See ``Batching``."""
        del cost
        return slo_odbs(candidates, room, self._settings)

    def keys(self, columns: Columns) -> tuple[Floats, ...]:
        """By the score."""
        slo = np.where(columns.deadline < inf, columns.deadline, columns.patience)
        score = self._settings.slo_weight * (slo - columns.accepted)
        return (score + self._settings.length_weight * columns.median, columns.accepted)


class SloDbs(SloOdbs):
    """The SLO term alone: for strict SLOs."""

    name = "slo-dbs"

    def _weighted(self, settings: SloOdbsSettings) -> SloOdbsSettings:
        return replace(settings, length_weight=0.0)


class Odbs(SloOdbs):
    """The length term alone: for throughput."""

    name = "odbs"

    def _weighted(self, settings: SloOdbsSettings) -> SloOdbsSettings:
        return replace(settings, slo_weight=0.0)


class CodedSloOdbs(SloOdbs):
    """SLO-ODBS as the authors' code has it."""

    name = "slo-odbs-coded"

    def parted(
        self, candidates: Sequence[Candidate], room: Room, cost: StepCost | None
    ) -> list[Batch]:
        """See ``Batching``."""
        del cost
        return coded_slo_odbs(candidates, room, self._settings)


@dataclass(frozen=True)
class S3Settings(Settings):
    """Settings of S3."""

    least_bin: int = setting(64, "Output tokens of the smallest bin; the next are twice.", least=1)
    max_wait_seconds: float = _MAX_WAIT


class S3(Batching):
    """S3: bins of predicted lengths under the KV limit; see ``uellm.policy.batching.s3``."""

    name = "s3"
    settings_type = S3Settings

    def __init__(self, settings: S3Settings | None = None) -> None:
        self._settings = settings or S3Settings()
        self.max_wait_seconds = self._settings.max_wait_seconds

    def parted(
        self, candidates: Sequence[Candidate], room: Room, cost: StepCost | None
    ) -> list[Batch]:
        """See ``Batching``."""
        del cost
        return s3(candidates, room, self._settings.least_bin)


class Morphling(Batching):
    """Morphling: batches in the order of arrival, of the size that a stress test found best."""

    name = "morphling"
    settings_type = MorphlingSettings

    def __init__(self, settings: MorphlingSettings | None = None) -> None:
        self._settings = settings or MorphlingSettings()

    def parted(
        self, candidates: Sequence[Candidate], room: Room, cost: StepCost | None
    ) -> list[Batch]:
        """See ``Batching``."""
        most = max(room.slots, 1) if cost is None else best_batch(room, cost, self._settings)
        return fifo(candidates, room, most)


@dataclass(frozen=True)
class FifoSettings(Settings):
    """Settings of FIFO batches."""

    most_requests: int = setting(10, "Most requests of a batch.", least=1)


class Fifo(Batching):
    """Batches in the order of arrival."""

    name = "fifo"
    settings_type = FifoSettings

    def __init__(self, settings: FifoSettings | None = None) -> None:
        self._settings = settings or FifoSettings()

    def parted(
        self, candidates: Sequence[Candidate], room: Room, cost: StepCost | None
    ) -> list[Batch]:
        """See ``Batching``."""
        del cost
        return fifo(candidates, room, self._settings.most_requests)


class StaticStep:
    """A step policy that admits the first batch of a batcher whenever nothing runs.

    Should KV room run out, because answers are longer than predicted, whoever was admitted last
    begins again in a later batch.
    """

    def __init__(self, batching: Batching) -> None:
        self.name = batching.name
        self._batching = batching

    def step(self, engine: EngineView, now: float) -> StepDecision:
        """See ``uellm.policy.views.StepPolicy``."""
        if engine.running:
            places = {s.request_id: -i for i, s in enumerate(engine.running)}
            return StepDecision(
                preempt=victims(engine, lambda s: (places[s.request_id],)),
                chunk_tokens=engine.max_chunk_tokens,
            )
        batches = self._batching.batches(
            [candidate_of(sequence) for sequence in engine.waiting],
            Room(engine.slots, min(engine.kv_tokens_free, engine.kv_tokens_total)),
            engine.cost,
            now,
        )
        first = batches[0] if batches else []
        return StepDecision(
            admit=tuple(candidate.request_id for candidate in first),
            chunk_tokens=engine.max_chunk_tokens,
        )


def candidate_of(sequence: SequenceView) -> Candidate:
    """A waiting sequence as batchers see it."""
    answered = max(sequence.prompt_tokens - sequence.profile.prompt_tokens, 0)
    median = sequence.profile.output_tokens.low_median_high[1]
    left = sequence.max_output_tokens - sequence.output_tokens
    return Candidate(
        request_id=sequence.request_id,
        arrived_at=sequence.slo.accepted_at,
        slo_seconds=slo_seconds(sequence.slo),
        output_tokens=max(min(median - answered, left), 1.0),
        kv_tokens=sequence.reserve_tokens,
        prompt_tokens=sequence.prompt_tokens,
        retries=sequence.preemptions,
    )
