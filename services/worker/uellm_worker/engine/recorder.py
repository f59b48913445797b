"""Some of a step policy's decisions, kept for whoever asks why; at a bounded share of the time."""

import time
from collections.abc import Mapping
from dataclasses import replace

from uellm.decisions.records import StepPolicyUsed, StepRecord
from uellm.decisions.segments import Entries, SegmentWriter
from uellm.policy.views import EngineView, StepDecision
from uellm.v1.decisions_pb2 import DecisionSegment

GATHER_SECONDS = 1.0
"""The decisions of so long go into one segment."""
SHARE = 0.01
"""Share of its time that an engine spends on recording, at most."""
SAVED_SECONDS = 0.02
"""So much time for recording is saved up at most."""
SEGMENT_RECORDS = 256
"""A segment takes no more records than this."""


class StepRecorder:
    """Keeps every so manieth decision, and those that somebody could ask about.

    These let in who had waited, preempt, or hand back. When they come faster than the share of
    time allows, they are kept without the sequences that they saw.

    Args:
        replica: whose engine.
        every_steps: every so many steps a decision is kept; 0: none ever is.

    Attributes:
        options: the policy's settings, where they are not its defaults.
    """

    def __init__(self, replica: str, every_steps: int) -> None:
        self.options: Mapping[str, str] = {}
        self._replica = replica
        self._every = every_steps
        self._entries = Entries()
        self._segment = SegmentWriter(self._entries)
        self._opened_at = 0.0
        self._next_step = 0
        self._asked_at = float("-inf")
        self._saved, self._looked_at = SAVED_SECONDS, time.perf_counter()
        self._dropped = 0

    def note(
        self,
        policy: str,
        step: int,
        engine: EngineView,
        decision: StepDecision,
        now: float,
        *,
        admits: bool = True,
    ) -> None:
        """Keep a decision, if it is one to keep.

        Args:
            policy: name of what decided.
            step: steps that were begun before.
            engine: what it saw.
            decision: what it decided.
            now: when.
            admits: who is to get a slot can; between two static batches only.
        """
        if not self._every:
            return
        lets_in = admits and self._lets_in(engine, decision)
        notable = lets_in or bool(decision.preempt or decision.hand_back)
        self._asked_at = now
        affordable = self._affordable()
        sampled = step >= self._next_step and affordable
        if not (notable or sampled):
            return
        if self._segment.records >= SEGMENT_RECORDS:
            self._dropped += 1
            return
        began = time.thread_time()
        record = StepRecord(
            now=now,
            replica=self._replica,
            step=step,
            policy=StepPolicyUsed(policy, self.options),
            engine=engine,
            decision=decision,
            running=len(engine.running),
            waiting=len(engine.waiting),
        )
        if affordable:
            self._next_step = step + self._every
        else:
            record = replace(record, engine=replace(engine, running=(), waiting=()), truncated=True)
        if not self._segment.records:
            self._opened_at = time.perf_counter()
        try:
            self._segment.add(record)
        except Exception:
            # What cannot be recorded must not keep the engine from its work.
            self._dropped += 1
        self._saved -= time.thread_time() - began

    def _lets_in(self, engine: EngineView, decision: StepDecision) -> bool:
        """Whether somebody gets a slot who was there at the decision before, and got none."""
        admitted = set(decision.admit)
        return bool(admitted) and any(
            sequence.arrived_at <= self._asked_at and sequence.request_id in admitted
            for sequence in engine.waiting
        )

    def _affordable(self) -> bool:
        now = time.perf_counter()
        self._saved = min(self._saved + SHARE * (now - self._looked_at), SAVED_SECONDS)
        self._looked_at = now
        return self._saved > 0

    def take(self, *, last: bool = False) -> DecisionSegment | None:
        """What was kept, once there is some of it or nothing more is to come; else None."""
        if not self._segment.records:
            return None
        if not last and time.perf_counter() - self._opened_at < GATHER_SECONDS:
            return None
        message = self._segment.message(self._dropped)
        self._segment, self._dropped = SegmentWriter(self._entries), 0
        return message
