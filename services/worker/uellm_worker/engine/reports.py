"""How a replica is doing, smoothed over its steps."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from uellm.v1.queue_pb2 import ReplicaReport, StageSeconds
from uellm_worker.engine.kv_usage import KvUsage

_WEIGHT = 0.1
"""Share of the newest step in a smoothed value: about the last twenty steps count."""


def _smoothed(old: float, new: float) -> float:
    """Exponential smoothing that starts at the first value."""
    return new if old == 0 else old + _WEIGHT * (new - old)


@dataclass(slots=True)
class StepMeter:
    """What the steps of one generation took.

    Attributes:
        step: steps so far.
        step_seconds: the last one's duration.
        prefill_tokens: prompt tokens computed in it.
        decode_sequences: sequences that decoded in it.
        context_tokens: tokens of context they attended to.
        prefill_seconds_per_token: smoothed; 0 until known.
        decode_step_seconds: smoothed; 0 until known.
        compute_seconds: per stage, smoothed.
        hop_seconds: smoothed time of one hop; all hops of a step are taken as equal, because
            clocks of different hosts cannot tell them apart.
    """

    step: int = 0
    step_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_sequences: int = 0
    context_tokens: int = 0
    prefill_seconds_per_token: float = 0.0
    decode_step_seconds: float = 0.0
    compute_seconds: list[float] = field(default_factory=list)
    hop_seconds: float = 0.0

    def add(
        self,
        step_seconds: float,
        prefill_tokens: int,
        decode_sequences: int,
        context_tokens: int,
        stage_seconds: Sequence[float],
    ) -> None:
        """Take in one step."""
        self.step += 1
        self.step_seconds = step_seconds
        self.prefill_tokens = prefill_tokens
        self.decode_sequences = decode_sequences
        self.context_tokens = context_tokens
        if prefill_tokens == 0:
            self.decode_step_seconds = _smoothed(self.decode_step_seconds, step_seconds)
        else:
            # What the decodes of a mixed step would have taken alone is not the prompt's.
            alone = self.decode_step_seconds if decode_sequences else 0.0
            per_token = max(step_seconds - alone, 0.0) / prefill_tokens
            self.prefill_seconds_per_token = _smoothed(self.prefill_seconds_per_token, per_token)
        if len(self.compute_seconds) != len(stage_seconds):
            self.compute_seconds = [0.0] * len(stage_seconds)
        self.compute_seconds = [
            _smoothed(old, new)
            for old, new in zip(self.compute_seconds, stage_seconds, strict=True)
        ]
        if len(stage_seconds) > 1:
            hop = max(step_seconds - sum(stage_seconds), 0.0) / len(stage_seconds)
            self.hop_seconds = _smoothed(self.hop_seconds, hop)

    def report(
        self,
        *,
        epoch: int,
        kv: KvUsage,
        running: int,
        waiting: int,
        slots: int,
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
            prefix_hit_tokens=kv.hit_tokens,
            stages=[
                StageSeconds(compute_seconds=seconds, hop_seconds=self.hop_seconds)
                for seconds in self.compute_seconds
            ],
            running=running,
            waiting=waiting,
            slots=slots,
            prefill_seconds_per_token=self.prefill_seconds_per_token,
            decode_step_seconds=self.decode_step_seconds,
        )
