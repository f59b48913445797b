"""A stage among its peers: passes steps on from the first stage to the last."""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol, TypeVar

import torch

from uellm_worker.engine.errors import out_of_memory
from uellm_worker.engine.plan import (
    StepPlan,
    StepResult,
    decode_plan,
    decode_result,
    encode_plan,
    encode_result,
)
from uellm_worker.engine.shard import Shard
from uellm_worker.engine.transport import Transport

_log = logging.getLogger(__name__)
Result = TypeVar("Result")


class Stage(Protocol):
    """What a member needs of its stage; see ``uellm_worker.engine.shard_stage.ShardStage``."""

    @property
    def last(self) -> Shard:
        """The layers that activations, or logits, go out at."""
        ...

    @property
    def depth(self) -> int:
        """Steps that its devices can have under way at once."""
        ...

    @property
    def seconds(self) -> tuple[float, ...]:
        """What each part took."""
        ...

    def skip(self, plan: StepPlan) -> None:
        """Do to the caches what a plan asks for, and no more."""
        ...

    def compute(self, plan: StepPlan, activation: torch.Tensor | None) -> torch.Tensor:
        """Compute a step."""
        ...

    def sample(self, plan: StepPlan, logits: torch.Tensor) -> StepResult:
        """Choose the tokens of a step."""
        ...


class ShardMember:
    """A stage among its peers.

    A step that memory is too short for is passed on empty, so that steps and results stay in order
    and the stages together: it ends as a result that says so.

    Args:
        stage: computes.
        transport: to the neighbours; None for a replica of one stage.
        stages: how many there are.
    """

    def __init__(self, stage: Stage, transport: Transport | None, stages: int = 1) -> None:
        self._stage = stage
        self._transport = transport
        self._stages = stages
        self._outputs: deque[tuple[StepPlan, torch.Tensor | None]] = deque()

    @property
    def depth(self) -> int:
        """See ``uellm_worker.engine.runner.Runner``."""
        return self._stages if self._transport is not None else self._stage.depth

    def submit(self, plan: StepPlan) -> None:
        """See ``uellm_worker.engine.runner.Runner``."""
        if self._transport is None:
            self._outputs.append((plan, self._compute(plan, None)))
        else:
            self._pass_on(self._transport, plan, None)

    def collect(self, *, patient: bool = True) -> StepResult | None:
        """See ``uellm_worker.engine.runner.Runner``."""
        if self._transport is None:
            # Only here the host waits for a device.
            return self._finish(*self._outputs.popleft())
        data = self._transport.wait_result(patient=patient)
        return None if data is None else decode_result(data)

    def follow(self, meta: bytes) -> None:
        """See ``uellm_worker.engine.runner.Member``."""
        if self._transport is None:
            raise RuntimeError("a replica of one stage has nobody to follow")
        plan, inline = decode_plan(meta)
        activation = None
        if not plan.abandoned:
            activation = self._transport.receive_activation(plan.rows, inline)
        if self._stage.last.spec.has_head:
            self._transport.send_result(
                encode_result(self._finish(plan, self._compute(plan, activation)))
            )
        else:
            self._pass_on(self._transport, plan, activation)

    def close(self) -> None:
        """See ``uellm_worker.engine.runner.Member``."""
        if self._transport is not None:
            self._transport.close()

    def _pass_on(
        self, transport: Transport, plan: StepPlan, activation: torch.Tensor | None
    ) -> None:
        """Compute this stage's part of a step for the next stage."""
        output = self._compute(plan, activation)
        seconds = (*plan.seconds, *self._stage.seconds)
        meta = encode_plan(replace(plan, seconds=seconds, abandoned=output is None))
        transport.send_step(meta, output)

    def _finish(self, plan: StepPlan, output: torch.Tensor | None) -> StepResult:
        """Choose the tokens of a step that was computed."""
        result = None
        if output is not None:
            result = _within_memory(plan, lambda: self._stage.sample(plan, output))
        seconds = (*plan.seconds, *self._stage.seconds)
        return replace(result or StepResult((), out_of_memory=True), seconds=seconds)

    def _compute(self, plan: StepPlan, activation: torch.Tensor | None) -> torch.Tensor | None:
        """This stage's part of a step; None if memory is too short for it."""
        if plan.abandoned:
            self._stage.skip(plan)
            return None
        return _within_memory(plan, lambda: self._stage.compute(plan, activation))


def _within_memory(plan: StepPlan, work: Callable[[], Result]) -> Result | None:
    """What ``work`` on a step returns; None if memory is too short for it."""
    try:
        return work()
    except Exception as error:
        if not out_of_memory(error):
            raise
        _log.warning("a step of %d tokens does not fit into memory: %s", plan.rows, error)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return None
