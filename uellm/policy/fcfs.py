"""First come, first served: the order every other policy is measured against."""

from uellm.policy.views import EngineView, StepDecision


class FcfsStep:
    """Admit in the order of arrival while slots and KV last; prefill as much as a step may.

    A sequence is admitted when its prompt and one answer of its 90 % quantile fit the KV room
    that is left, so that preemption is the exception.
    """

    name = "fcfs"

    def step(self, engine: EngineView, now: float) -> StepDecision:
        """See ``uellm.policy.views.StepPolicy``."""
        del now
        free_slots = engine.slots - len(engine.running)
        free_tokens = engine.kv_tokens_free
        admit: list[str] = []
        reconsider_when: int | None = None
        for sequence in sorted(engine.waiting, key=lambda s: (s.arrived_at, s.rank)):
            if len(admit) == free_slots:
                break
            expected = min(
                sequence.profile.output_tokens.at(0.9), float(sequence.max_output_tokens)
            )
            need = sequence.prompt_tokens + max(1, round(expected))
            if need > free_tokens and (engine.running or admit):
                reconsider_when = need
                break
            admit.append(sequence.request_id)
            free_tokens -= need
        return StepDecision(
            admit=tuple(admit),
            chunk_tokens=engine.max_chunk_tokens,
            reconsider_when=reconsider_when,
        )
