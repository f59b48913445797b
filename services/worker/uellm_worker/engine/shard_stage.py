"""One worker's part of every step: the layers that it has, and on the last stage the tokens."""

from collections.abc import Sequence

import torch

from uellm_worker.engine.capacity import Capacity
from uellm_worker.engine.device import move, on_host
from uellm_worker.engine.part import Part
from uellm_worker.engine.plan import Admission, StepPlan, StepResult
from uellm_worker.engine.sampling import Choice, choose
from uellm_worker.engine.shard import Shard


class ShardStage:
    """One worker's part of every step: parts on one or several devices, chained.

    Args:
        parts: in layer order; each has room for ``capacity``.
        capacity: of the caches.
    """

    def __init__(self, parts: Sequence[Part], capacity: Capacity) -> None:
        self.parts = tuple(parts)
        self.capacity = capacity
        self._eos_ids = sorted(self.last.eos_ids)
        self._admissions: dict[int, Admission] = {}

    @property
    def first(self) -> Shard:
        """The layers that activations come in at."""
        return self.parts[0].shard

    @property
    def last(self) -> Shard:
        """The layers that activations, or logits, go out at."""
        return self.parts[-1].shard

    def compute(self, plan: StepPlan, activation: torch.Tensor | None) -> torch.Tensor:
        """Compute a step.

        Args:
            plan: what.
            activation: ``[T, hidden]`` of the stage before, on the first part's device; None where
                the embedding is.

        Returns:
            ``[T, hidden]``, or where the head is ``[n, vocabulary]`` of the rows that sample, on
            the last part's device.
        """
        self._admit(plan)
        first, *others = self.parts
        output = first.compute(plan, activation)
        for part in others:
            output = part.compute(plan, move(output, part.device.place))
        return output

    @property
    def depth(self) -> int:
        """One per device, where devices compute beside the host."""
        return 1 if on_host(self.parts[0].device.place) else len(self.parts)

    def skip(self, plan: StepPlan) -> None:
        """Do to the caches what a plan asks for, and no more.

        Steps behind it may be under way already; they are computed, and then of no use.
        """
        self._admit(plan)
        for part in self.parts:
            part.cache.carry_out(plan.moves)

    def _admit(self, plan: StepPlan) -> None:
        """Keep how the tokens of new sequences are chosen."""
        for admission in plan.admissions:
            self._admissions[admission.slot] = admission

    @property
    def seconds(self) -> tuple[float, ...]:
        """What each part took, in order; see ``Stopwatch`` for when that is known."""
        return tuple(part.watch.seconds for part in self.parts)

    def sample(self, plan: StepPlan, logits: torch.Tensor) -> StepResult:
        """Choose the tokens of a step; on the last stage."""
        choices = []
        for chunk in plan.chunks:
            if chunk.sample:
                admission = self._admissions[chunk.slot]
                position = chunk.start + chunk.count - admission.prompt_tokens
                choices.append(Choice(admission.sampling, position))
        if not choices:
            return StepResult(())
        with torch.inference_mode():
            token_ids, logprobs = choose(logits, choices, self._eos_ids)
        self.parts[-1].watch.stop()
        return StepResult(token_ids, logprobs)
