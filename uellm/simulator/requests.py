"""Requests as the simulator knows them: with what nobody knows in advance."""

from dataclasses import dataclass

from uellm.core.request import Priority, Slo


@dataclass(frozen=True, slots=True)
class Request:
    """A request of a workload.

    Attributes:
        request_id: its id; ids ascend with arrivals.
        arrival: seconds.
        prompt_tokens: of the prompt.
        output_tokens: what its answer comes to.
        kind: its class, by which results are told apart.
        max_tokens: cap on its answer.
        deadline: seconds from arrival to the last token, or None.
        ttft: seconds from arrival to the first token, or None.
        tpot: mean seconds per token after the first, or None.
        priority: urgency class.
        tenant: whose it is.
    """

    request_id: str
    arrival: float
    prompt_tokens: int
    output_tokens: int
    kind: str
    max_tokens: int
    deadline: float | None = None
    ttft: float | None = None
    tpot: float | None = None
    priority: Priority = Priority.NORMAL
    tenant: str = "local"

    @property
    def slo(self) -> Slo:
        """Its objective, made absolute."""
        return Slo(
            accepted_at=self.arrival,
            deadline_at=None if self.deadline is None else self.arrival + self.deadline,
            ttft_at=None if self.ttft is None else self.arrival + self.ttft,
            tpot_seconds=self.tpot,
            priority=self.priority,
        )

    def met_by(self, first_token_at: float, finished_at: float) -> bool:
        """Whether an answer that came so is in time."""
        since = finished_at - self.arrival
        return not (
            (self.deadline is not None and since > self.deadline)
            or (self.ttft is not None and first_token_at - self.arrival > self.ttft)
            or (
                self.tpot is not None
                and finished_at - first_token_at > self.tpot * max(self.output_tokens - 1, 1)
            )
        )
