"""Until when a sequence can wait, and whether its objective is lost."""

from dataclasses import dataclass
from math import inf

from uellm.policy.due import PATIENCE_SECONDS, due_at
from uellm.policy.latency import StepCost, chunk_pairs
from uellm.policy.occupancy import held_tokens
from uellm.policy.remaining import answered_tokens, remaining_tokens
from uellm.policy.views import EngineView, SequenceView


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast an engine is at present.

    Attributes:
        cost: of its steps.
        step: seconds of a step at the present load.
        best: seconds of a step for an optimistic test.
    """

    cost: StepCost
    step: float
    best: float


def pace_of(engine: EngineView, cost: StepCost) -> Pace:
    """The pace of an engine, from what runs in it.

    Where sequences wait, prefill goes on beside decoding: as much of it a step as keeps up with
    those that run.
    """
    running = engine.running
    tokens = float(max(len(running), 1))
    context = 0
    for sequence in running:
        context += sequence.computed_tokens
        if engine.waiting:
            tokens += sequence.prompt_tokens / max(sequence.profile.output_tokens.mean, 1.0)
    step = cost.seconds(min(tokens, engine.max_chunk_tokens), context)
    return Pace(cost, step, (step + cost.unloaded) / 2)


@dataclass(slots=True)
class Outlook:
    """What is to be expected of a sequence.

    Attributes:
        sequence: which.
        held: KV tokens that it takes now, or would take with a slot.
        median: tokens that it will still generate: median.
        cautious: tokens that it will hardly exceed.
        prefill: seconds to compute what a slot would have to be filled with anew.
        latest_start: it is in time if it has a slot from then on.
        last_chance: the same, if its answer is short and steps are fast.
        due: when it is due.
        lost: its objective cannot be met any more.
    """

    sequence: SequenceView
    held: int
    median: float
    cautious: float
    prefill: float
    latest_start: float
    last_chance: float
    due: float
    lost: bool


def outlook(
    sequence: SequenceView, pace: Pace, now: float, block_tokens: int, caution: float
) -> Outlook:
    """What is to be expected of a sequence, waiting or running.

    Its objective counts as lost if even a short answer (``median² / high``) at the best pace is
    too late: a test that wrongly gives up one in a hundred costs more than it gains.
    """
    _, median, high = remaining_tokens(sequence)
    slo, cost = sequence.slo, pace.cost
    tokens = max(sequence.prompt_tokens, sequence.computed_tokens)
    prefill = max(cost.unloaded, cost.per_token * tokens) + cost.per_pair * chunk_pairs(0, tokens)
    answered = answered_tokens(sequence)
    begun = sequence.first_token_at is not None or answered > 0
    latest, optimistic = inf, inf
    if slo.deadline_at is not None:
        short = max(min(median * median / high, median), 1.0)
        latest = slo.deadline_at - prefill - median * pace.step
        ahead = prefill if sequence.computed_tokens < sequence.prompt_tokens else 0.0
        optimistic = slo.deadline_at - ahead - short * pace.best
    if slo.ttft_at is not None:
        if not begun:
            by = slo.ttft_at - prefill - pace.step
            latest, optimistic = min(latest, by), min(optimistic, by + pace.step - pace.best)
        elif sequence.first_token_at is not None and sequence.first_token_at > slo.ttft_at:
            optimistic = -inf
    first = sequence.first_token_at
    if slo.tpot_seconds is not None and first is not None:
        # It is the mean that counts: a long answer has time to catch up.
        end = first + slo.tpot_seconds * (answered + median)
        latest = min(latest, end - prefill - median * pace.step)
        end = first + slo.tpot_seconds * (answered + high)
        optimistic = min(optimistic, end - high * pace.best)
    due = due_at(slo, now, started=begun)
    if latest == inf:
        latest = slo.accepted_at + PATIENCE_SECONDS[slo.priority]
    return Outlook(
        sequence=sequence,
        held=held_tokens(sequence, block_tokens),
        median=median,
        cautious=median + caution * (high - median),
        prefill=prefill,
        latest_start=latest,
        last_chance=optimistic,
        due=due,
        lost=optimistic < now,
    )
