"""What the leader of a replica does between two steps: a loop over one layer, timed."""

import time
from collections.abc import Callable

from uellm.policy.registry import DEFAULT_POLICY, step_policy
from uellm.v1.common_pb2 import Sampling
from uellm.v1.engine_pb2 import AddSequence, StepReport
from uellm_worker.engine.capacity import Vocabulary
from uellm_worker.engine.loop import EngineLoop
from uellm_worker.engine.member import ShardMember
from uellm_worker.engine.rests import REST_SECONDS
from uellm_worker.engine.shard_stage import ShardStage
from uellm_worker.engine.step_timing import usual_mean

_SEQUENCES = 4
_LEAST_STEPS, _MOST_STEPS, _SECONDS = 11, 32, 0.5
"""Some steps are longer than others: so many are timed at least, and more while there is time."""
_PROMPT = (1, 1)


def leader_seconds(stage: ShardStage, tell: Callable[[StepReport], object]) -> float:
    """Mean seconds of a step that only decodes which are not the stage's own.

    Args:
        stage: with embedding and head; whatever it has computed is lost.
        tell: told each step, as the agent is.
    """
    vocabulary = Vocabulary(stage.first.config.vocab_size, stage.first.eos_ids)
    loop = EngineLoop(
        ShardMember(stage, None), step_policy(DEFAULT_POLICY), stage.capacity, vocabulary
    )
    sequences = min(_SEQUENCES, stage.capacity.slots)
    steps = max(min(_MOST_STEPS, stage.capacity.max_tokens - len(_PROMPT)), 1)
    for index in range(sequences):
        loop.add(
            AddSequence(
                request_id=str(index),
                token_ids=_PROMPT,
                prompt_tokens=len(_PROMPT),
                sampling=Sampling(max_tokens=steps, ignore_eos=True),
            )
        )
    took: list[float] = []
    end = time.perf_counter() + _SECONDS
    while loop.busy and (len(took) < _LEAST_STEPS or time.perf_counter() < end):
        time.sleep(REST_SECONDS)
        started = time.perf_counter()
        report = loop.step()
        if report is None:
            break
        tell(report)
        if not report.report.prefill_tokens:
            took.append(time.perf_counter() - started - sum(stage.seconds))
    return max(usual_mean(took), 0.0) if took else 0.0
