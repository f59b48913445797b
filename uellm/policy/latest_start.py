"""Until when sequences can wait, and whether their objectives are lost."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, nan

import numpy as np
import numpy.typing as npt

from uellm.core.cost import StepCost
from uellm.policy.due import PATIENCE_SECONDS
from uellm.policy.remaining import remaining_tokens
from uellm.policy.rows import Array, Floats, RowCache
from uellm.policy.views import EngineView, SequenceView

_ROWS = 14


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast an engine is at present.

    Attributes:
        cost: of its steps.
        step: seconds of a step at the present load.
        best: seconds of a step for an optimistic test.
        turnover: prompt tokens a step that take the place of answers that end.
        dear: arithmetic sets the pace, not the streaming of the weights.
    """

    cost: StepCost
    step: float
    best: float
    turnover: float
    dear: bool


def pace_of(engine: EngineView, running: Floats, cost: StepCost) -> Pace:
    """The pace of an engine, from what runs in it.

    Where sequences wait, prefill goes on beside decoding: as much of it a step as keeps up with
    those that run.

    Args:
        engine: the engine.
        running: facts of what runs; see ``facts_of``.
        cost: of its steps.
    """
    tokens = float(max(running.shape[1], 1))
    turnover = float((running[5] / (running[7] + running[8])).sum())
    if engine.waiting:
        tokens += turnover
    context = float(running[6].sum())
    step = cost.seconds(min(tokens, engine.max_chunk_tokens), context)
    return Pace(cost, step, (step + cost.unloaded) / 2, turnover, tokens >= cost.knee)


def _facts(sequence: SequenceView) -> tuple[float, ...]:
    slo = sequence.slo
    prompt, computed = sequence.prompt_tokens, sequence.computed_tokens
    answered = (prompt if prompt > computed else computed) - sequence.profile.prompt_tokens
    answered = max(answered, sequence.output_tokens)
    _, median, high = remaining_tokens(sequence)
    first = sequence.first_token_at
    begun = first is not None or answered > 0
    deadline, ttft, tpot = slo.deadline_at, slo.ttft_at, slo.tpot_seconds
    return (
        slo.accepted_at,
        inf if deadline is None else deadline,
        inf if ttft is None or begun else ttft,
        inf if tpot is None else tpot,
        nan if first is None else first,
        prompt,
        computed,
        answered if answered > 0 else 0,
        median,
        high,
        slo.accepted_at + PATIENCE_SECONDS[slo.priority],
        # It is lost for good: the first token came too late.
        ttft is not None and first is not None and first > ttft,
        sequence.arrived_at,
        sequence.rank,
    )


def facts_of(sequences: Sequence[SequenceView]) -> Floats:
    """Numbers of sequences, a column for each; ``Outlook`` gives them names."""
    rows = np.array([_facts(sequence) for sequence in sequences], dtype=np.float64)
    return np.ascontiguousarray(rows.reshape(len(sequences), _ROWS).T)


def _arrays(sequences: Sequence[SequenceView]) -> tuple[Array, ...]:
    return (facts_of(sequences),)


class FactsCache:
    """Facts of what waits: while it does, they do not change."""

    def __init__(self) -> None:
        self._rows = RowCache(_arrays)

    def of(self, sequences: Sequence[SequenceView]) -> Floats:
        """Numbers of these sequences; see ``facts_of``."""
        return self._rows.of(sequences)[0]


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is to be expected of sequences, an entry for each in every array.

    Attributes:
        sequences: which.
        accepted: when they became durable.
        deadline: when their answers are needed; infinite: whenever.
        tpot: most seconds per token; infinite: any.
        first_token_at: when their first tokens came, or NaN.
        decoding: their prompts are computed.
        computed: tokens with KV in the cache.
        answered: tokens of their answers.
        held: KV tokens that they take now, or would take with a slot.
        median: tokens that they will still generate: median.
        cautious: tokens that they will hardly exceed.
        prefill: seconds to compute what a slot would have to be filled with anew.
        latest_start: they are in time if they have a slot from then on, and are not too long.
        last_chance: the same, if their answers are short and steps are fast.
        due: when they are due.
        lost: their objectives cannot be met any more.
        arrived: when they came, and their ranks.
    """

    sequences: Sequence[SequenceView]
    accepted: Floats
    deadline: Floats
    tpot: Floats
    first_token_at: Floats
    decoding: npt.NDArray[np.bool_]
    computed: Floats
    answered: Floats
    held: Floats
    median: Floats
    cautious: Floats
    prefill: Floats
    latest_start: Floats
    last_chance: Floats
    due: Floats
    lost: npt.NDArray[np.bool_]
    arrived: tuple[Floats, Floats]


def outlook(
    sequences: Sequence[SequenceView],
    facts: Floats,
    pace: Pace,
    now: float,
    block_tokens: int,
    caution: float,
    foresight: float,
) -> Outlook:
    """What is to be expected of sequences, waiting or running.

    Lengths are taken so far from their median to their 90 % quantile: ``caution`` where room is
    concerned, in which many make up for each other, ``foresight`` where each has to be in time.

    An objective counts as lost if even a short answer (``median² / high``) at the best pace is
    too late: a test that wrongly gives up one in a hundred costs more than it gains.
    """
    (accepted, deadline, ttft, tpot, first, prompt, computed, answered) = facts[:8]
    (median, high, patience, came_late, arrived, rank) = facts[8:]
    cost = pace.cost
    known = np.maximum(prompt, computed)
    prefill = np.maximum(cost.unloaded, cost.per_token * known)
    if cost.per_pair:
        prefill = prefill + cost.per_pair * known * (known + 1) / 2
    decoding = computed >= prompt
    short = np.minimum(np.maximum(median * median / high, 1.0), median)
    own = (median + foresight * (high - median)) * pace.step
    latest = deadline - prefill - own
    chance = deadline - np.where(decoding, 0.0, prefill) - short * pace.best
    by = ttft - prefill
    latest = np.minimum(latest, by - pace.step)
    chance = np.minimum(chance, by - pace.best)
    chance = np.where(came_late > 0, -inf, chance)
    # It is the mean that counts: a long answer has time to catch up.
    paced = np.isfinite(tpot) & np.isfinite(first)
    if paced.any():
        end = first + tpot * (answered + median)
        latest = np.where(paced, np.fmin(latest, end - prefill - own), latest)
        end = first + tpot * (answered + high)
        chance = np.where(paced, np.fmin(chance, end - high * pace.best), chance)
    due = np.minimum(deadline, np.where(ttft > now, ttft, inf))
    return Outlook(
        sequences=sequences,
        accepted=accepted,
        deadline=deadline,
        tpot=tpot,
        first_token_at=first,
        decoding=decoding,
        computed=computed,
        answered=answered,
        held=np.ceil((known + 1) / block_tokens) * block_tokens,
        median=median,
        cautious=median + caution * (high - median),
        prefill=prefill,
        latest_start=np.where(latest == inf, patience, latest),
        last_chance=chance,
        due=np.where(due == inf, patience, due),
        lost=chance < now,
        arrived=(arrived, rank),
    )
