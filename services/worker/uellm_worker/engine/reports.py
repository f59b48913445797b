"""How a replica is doing, smoothed over its steps."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from uellm.convert import cost_to_proto
from uellm.core.cost import DEFAULT_COST, StepCost
from uellm.policy.latency import LatencyModel
from uellm.v1 import common_pb2
from uellm.v1.queue_pb2 import ReplicaReport, StageSeconds
from uellm_worker.engine.flights import Flight, Work
from uellm_worker.engine.kv_usage import KvUsage
from uellm_worker.engine.plan import StepResult

_WEIGHT = 0.1
"""Share of the newest step in a smoothed value: about the last twenty steps count."""


def _smoothed(old: float, new: float) -> float:
    """Exponential smoothing that starts at the first value."""
    return new if old == 0 else old + _WEIGHT * (new - old)


def _all_smoothed(old: Sequence[float], new: Sequence[float]) -> list[float]:
    if len(old) != len(new):
        return list(new)
    return [_smoothed(*pair) for pair in zip(old, new, strict=True)]


class CostMeter:
    """What a step takes, learnt from those that ended.

    To whom decides, a step is one token of everybody who runs. Where several steps are under way
    together, each of other sequences, that is what ends between the beginning and the end of any
    one of them. It begins where the one before it left off: what is done between two steps counts.

    Args:
        prior: what is assumed at first.
    """

    def __init__(self, prior: StepCost = DEFAULT_COST) -> None:
        self._model = LatencyModel(prior)
        self._tokens = self._context = 0
        self._pairs = 0.0
        self._fitted = prior
        self._report = cost_to_proto(prior)

    @property
    def cost(self) -> StepCost:
        """What a step takes."""
        return self._model.cost

    @property
    def ended(self) -> Work:
        """The work of all steps that have ended."""
        return (self._tokens, self._context, self._pairs)

    def add(self, flight: Flight, context: int, now: float) -> None:
        """Learn from a step that ended; its decodes attended to so many tokens."""
        self._tokens += flight.plan.rows
        self._context += context
        self._pairs += flight.pairs
        before = flight.ended_before
        self._model.observe(
            self._tokens - before[0],
            self._context - before[1],
            self._pairs - before[2],
            now - flight.began_at,
        )

    def report(self) -> common_pb2.StepCost:
        """The present fit; made anew only when there is another one."""
        model = self._model
        if self._fitted is not model.cost:
            self._fitted = model.cost
            self._report = cost_to_proto(model.cost, model.observations, model.mean_error or 0.0)
        return self._report


@dataclass(slots=True)
class StepMeter:
    """What the steps of one generation took.

    Attributes:
        submitted: steps that were begun.
        step: steps that have ended.
        step_seconds: the last one's duration, from its submission to its result.
        interval_seconds: what the last one took of the replica's time: since it was submitted, or
            since the result before it, whichever was later.
        prefill_tokens: prompt tokens computed in it.
        decode_sequences: sequences that decoded in it.
        context_tokens: tokens of context they attended to.
        padding_tokens: computed for the shape of static batches, in all.
        recomputed_tokens: computed again, in all, because their sequence had lost its slot.
        prefill_seconds_per_token: smoothed; 0 until known.
        decode_step_seconds: smoothed time from one token of a sequence to its next; 0 until known.
        decode_interval_seconds: smoothed interval of steps that only decode; 0 until known.
        compute_seconds: per stage, smoothed.
        decode_seconds: per stage, of steps that only decode, smoothed.
        decode_mean: sequences of these steps, the tokens that they attend to, and steps under way
            while they are, smoothed likewise.
        prefill_seconds: per stage, of steps that only compute prompts, smoothed.
        prefill_mean: tokens of these steps and pairs of tokens in them, smoothed likewise.
        cost: what steps take by what they compute.
        hop_seconds: smoothed time of one hop; all hops of a step are taken as equal, because
            clocks of different hosts cannot tell them apart. Known of steps that were alone under
            way: others wait for each other.
    """

    submitted: int = 0
    step: int = 0
    step_seconds: float = 0.0
    interval_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_sequences: int = 0
    context_tokens: int = 0
    padding_tokens: int = 0
    recomputed_tokens: int = 0
    prefill_seconds_per_token: float = 0.0
    decode_step_seconds: float = 0.0
    decode_interval_seconds: float = 0.0
    compute_seconds: list[float] = field(default_factory=list)
    decode_seconds: list[float] = field(default_factory=list)
    decode_mean: list[float] = field(default_factory=list)
    prefill_seconds: list[float] = field(default_factory=list)
    prefill_mean: list[float] = field(default_factory=list)
    hop_seconds: float = 0.0
    cost: CostMeter = field(default_factory=CostMeter)
    _last_result_at: float = 0.0

    def add(self, flight: Flight, result: StepResult, now: float, *, alone: bool) -> None:
        """Take in a step that ended at ``now``, by the clock of its submission.

        Args:
            flight: the step.
            result: what came of it.
            now: seconds.
            alone: no other step was under way meanwhile.
        """
        decodes = flight.decodes
        self.step += 1
        self.step_seconds = now - flight.submitted_at
        self.interval_seconds = now - max(flight.submitted_at, self._last_result_at)
        self._last_result_at = now
        padding = flight.plan.rows - sum(share.chunk.count for share in flight.shares)
        self.padding_tokens += padding
        self.recomputed_tokens += sum(
            share.sequence.reach(share.chunk.start, share.chunk.count) for share in flight.shares
        )
        self.prefill_tokens = flight.plan.rows - padding - len(decodes)
        self.decode_sequences = len(decodes)
        self.context_tokens = sum(share.chunk.start + 1 for share in decodes)
        self.cost.add(flight, self.context_tokens, now)
        if self.prefill_tokens == 0 and decodes:
            self.decode_step_seconds = _smoothed(self.decode_step_seconds, self.step_seconds)
            interval = _smoothed(self.decode_interval_seconds, self.interval_seconds)
            self.decode_interval_seconds = interval
            self.decode_seconds = _all_smoothed(self.decode_seconds, result.seconds)
            # As many as end while one is under way (Little's law).
            under_way = self.step_seconds / max(self.interval_seconds, 1e-9)
            work = (len(decodes), self.context_tokens, under_way)
            self.decode_mean = _all_smoothed(self.decode_mean, work)
        elif self.prefill_tokens:
            # What the decodes of a mixed step would have taken alone is not the prompt's.
            theirs = self.decode_interval_seconds if decodes else 0.0
            per_token = max(self.interval_seconds - theirs, 0.0) / self.prefill_tokens
            self.prefill_seconds_per_token = _smoothed(self.prefill_seconds_per_token, per_token)
            if not decodes:
                self.prefill_seconds = _all_smoothed(self.prefill_seconds, result.seconds)
                prompts = (self.prefill_tokens, flight.pairs)
                self.prefill_mean = _all_smoothed(self.prefill_mean, prompts)
        self._add_stages(result.seconds, alone=alone)

    def _add_stages(self, stage_seconds: Sequence[float], *, alone: bool) -> None:
        self.compute_seconds = _all_smoothed(self.compute_seconds, stage_seconds)
        if alone and len(stage_seconds) > 1:
            hop = max(self.step_seconds - sum(stage_seconds), 0.0) / len(stage_seconds)
            self.hop_seconds = _smoothed(self.hop_seconds, hop)

    def report(
        self,
        *,
        epoch: int,
        kv: KvUsage,
        running: int,
        waiting: int,
        slots: int,
        policy: str = "",
        execution: str = "",
    ) -> ReplicaReport:
        """The report that goes with a step."""
        return ReplicaReport(
            epoch=epoch,
            step=self.step,
            step_seconds=self.step_seconds,
            prefill_tokens=self.prefill_tokens,
            decode_sequences=self.decode_sequences,
            context_tokens=self.context_tokens,
            kv_tokens_free=kv.free_tokens,
            kv_tokens_total=kv.total_tokens,
            kv_tokens_used=kv.used_tokens,
            kv_tokens_reserved=kv.reserved_tokens,
            kv_tokens_cached=kv.cached_tokens,
            kv_tokens_committed=kv.committed_tokens,
            kv_block_tokens=kv.block_tokens,
            prefix_hit_tokens=kv.hit_tokens,
            padding_tokens=self.padding_tokens,
            computed_tokens=self.cost.ended[0],
            recomputed_tokens=self.recomputed_tokens,
            stages=[
                StageSeconds(
                    compute_seconds=seconds,
                    hop_seconds=self.hop_seconds,
                    decode_seconds=decode,
                    prefill_seconds=prefill,
                )
                for seconds, decode, prefill in zip_longest(
                    self.compute_seconds, self.decode_seconds, self.prefill_seconds, fillvalue=0.0
                )
            ],
            decode_step_sequences=self.decode_mean[0] if self.decode_mean else 0.0,
            decode_step_context_tokens=self.decode_mean[1] if self.decode_mean else 0.0,
            decode_steps_in_flight=self.decode_mean[2] if self.decode_mean else 0.0,
            prefill_step_tokens=self.prefill_mean[0] if self.prefill_mean else 0.0,
            prefill_step_pairs=self.prefill_mean[1] if self.prefill_mean else 0.0,
            running=running,
            waiting=waiting,
            slots=slots,
            prefill_seconds_per_token=self.prefill_seconds_per_token,
            decode_step_seconds=self.decode_step_seconds,
            cost=self.cost.report(),
            policy=policy,
            execution=execution,
        )
