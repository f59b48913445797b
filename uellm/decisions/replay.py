"""Recorded decisions, decided again: by the policy that decided them, or by another."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import nan
from typing import Any

from uellm.core.errors import InvalidArgumentError
from uellm.core.request import Promise
from uellm.decisions.records import (
    DispatchPolicyUsed,
    DispatchRecord,
    Record,
    StepPolicyUsed,
)
from uellm.policy.choice import DISPATCH, STEP, PolicyChoice, levels_of
from uellm.policy.prospects import Forecasts, Prospects
from uellm.policy.track_record import TrackRecord
from uellm.policy.views import Dispatch, DispatchSettings, Refusal

Used = DispatchPolicyUsed | StepPolicyUsed
_SHARED: Mapping[str, type] = {each.name: type(each.default) for each in fields(DispatchSettings)}
EXAMPLES = 5
"""So many differences of each kind are described."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that was decided otherwise.

    Attributes:
        now: when, in seconds since the epoch.
        what: a field of the decision.
        recorded: what was decided.
        replayed: what is decided now.
    """

    now: float
    what: str
    recorded: str
    replayed: str


@dataclass(slots=True)
class Replay:
    """What came of deciding again.

    Attributes:
        dispatches: decisions of schedulers that were made again.
        steps: decisions of engines that were made again.
        truncated: records that do not hold all that was seen, and were passed over.
        different: decisions that came out otherwise.
        counts: by field of the decision, in how many it differs.
        examples: the first differences of each field.
        first: the first of all.
    """

    dispatches: int = 0
    steps: int = 0
    truncated: int = 0
    different: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: list[Difference] = field(default_factory=list)
    first: Difference | None = None

    def take(self, differences: list[Difference]) -> None:
        """Note how one decision differs."""
        self.different += bool(differences)
        for difference in differences:
            self.first = self.first or difference
            if self.counts[difference.what] < EXAMPLES:
                self.examples.append(difference)
            self.counts[difference.what] += 1


@dataclass(frozen=True, slots=True)
class Instead:
    """What to decide with in place of what was recorded.

    Attributes:
        policy: its name; "": the recorded one.
        settings: of the policy as for ``PolicyChoice``, or of every policy (``DispatchSettings``).

    Raises:
        InvalidArgumentError: if neither level has such a policy.
    """

    policy: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.policy:
            PolicyChoice(self.policy).check()

    def of(self, used: Used) -> Used | None:
        """What decides; None if the policy has no half at this level.

        Raises:
            InvalidArgumentError: if it has no such setting, or a value is not what it should be.
        """
        name = self.policy or used.name
        level = DISPATCH if isinstance(used, DispatchPolicyUsed) else STEP
        if level not in levels_of(name):
            return None
        shared = {n: _number(n, v) for n, v in self.settings.items() if n in _SHARED}
        choice = PolicyChoice(name, {n: v for n, v in self.settings.items() if n not in _SHARED})
        if choice.settings:
            choice.check()
        options = {**(used.options if name == used.name else {}), **choice.at(level)}
        if isinstance(used, DispatchPolicyUsed):
            return DispatchPolicyUsed(name, replace(used.settings, **shared), options)
        return StepPolicyUsed(name, options)


def _number(name: str, text: str) -> Any:
    kind = _SHARED[name]
    try:
        value = kind(text)
    except ValueError:
        value = -1
    if not value >= 0:
        wanted = "a whole number" if kind is int else "a number"
        raise InvalidArgumentError(f"{name}: {text!r} is not {wanted} of at least 0", field=name)
    return value


def replay(records: Iterable[Record], instead: Instead | None = None) -> Replay:
    """Decide again what was recorded, and compare.

    Args:
        records: in any order; each stands for itself.
        instead: another policy, or other settings; None: what was recorded, by which every
            decision has to come out as it did.

    Raises:
        InvalidArgumentError: if a policy is not installed here, or has no such setting.
    """
    instead = instead or Instead()
    result = Replay()
    made: dict[str, tuple[Used, Any] | None] = {}
    for record in records:
        if record.truncated:
            result.truncated += 1
            continue
        # What policies keep between decisions changes time only.
        recorded = repr(record.policy)
        if recorded not in made:
            used = instead.of(record.policy)
            made[recorded] = (used, used.make()) if used is not None else None
        found = made[recorded]
        if found is None:
            continue
        used, policy = found
        if isinstance(record, DispatchRecord):
            result.dispatches += 1
            queue = replace(record.queue, experience=Remembered(record))
            again = policy.dispatch(queue, record.replicas, record.now)
        else:
            result.steps += 1
            again = policy.step(record.engine, record.now)
        result.take(differences(record, again, by_another=used.name != record.policy.name))
    return result


class Remembered:
    """What was known of how forecasts came true, as far as a decision shows it.

    Args:
        record: of the decision.
    """

    def __init__(self, record: DispatchRecord) -> None:
        decision = record.decision
        refused = {r.request_id: r.promise for r in decision.refusals if r.promise is not None}
        self._promises = {**decision.promises, **refused}
        self._promised = record.queue.promised
        self._ignorant = TrackRecord()

    def prospects(self, forecasts: Forecasts, now: float) -> Prospects:
        """See ``uellm.policy.views.Experience``."""
        found = self._ignorant.prospects(forecasts, now)
        times, p_meet = found.times.copy(), found.p_meet.copy()
        for row, request_id in enumerate(forecasts.ids):
            promise = self._promises.get(request_id)
            if promise is not None:
                times[row] = (
                    (promise.start_p50, promise.start_p90),
                    (promise.finish_p50, promise.finish_p90),
                )
                p_meet[row] = nan if promise.p_meet is None else promise.p_meet
            elif request_id in self._promised:
                # It was asked about, and nothing was worth saying.
                times[row] = self._promised[request_id]
        return Prospects(times, p_meet, found.said, found.in_turn)


def differences(record: Record, again: Any, *, by_another: bool = False) -> list[Difference]:
    """How a decision that was made again differs, by its fields.

    Args:
        record: the decision.
        again: the one that was made again.
        by_another: by another policy; that promises and refusals name it is no difference.
    """
    recorded = record.decision
    found = []
    for each in fields(recorded):
        before, after = getattr(recorded, each.name), getattr(again, each.name)
        if by_another:
            before, after = _unsigned(before), _unsigned(after)
        if before != after:
            described = _described(before, after, record.now)
            found.append(Difference(record.now, each.name, *described))
    return found


def _unsigned(value: Any) -> Any:
    """Promises, and what carries some, without the words of the policy that made them."""
    if isinstance(value, Promise):
        return replace(value, policy="", reason="")
    if isinstance(value, Mapping):
        return {name: _unsigned(each) for name, each in value.items()}
    if isinstance(value, Refusal):
        return replace(value, message="", promise=_unsigned(value.promise))
    if isinstance(value, tuple):
        return tuple(map(_unsigned, value))
    return value


def _described(before: Any, after: Any, now: float) -> tuple[str, str]:
    """Both sides where they first differ."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        name = next(n for n in [*before, *after] if before.get(n) != after.get(n))
        return (
            f"{name}: {_words(before.get(name), now)}",
            f"{name}: {_words(after.get(name), now)}",
        )
    if isinstance(before, Sequence) and isinstance(after, Sequence):
        place = next(
            (i for i, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]),
            min(len(before), len(after)),
        )
        return _at(before, place, now), _at(after, place, now)
    return str(before), str(after)


def _at(values: Sequence[Any], place: int, now: float) -> str:
    return f"[{place}] {_words(values[place], now) if place < len(values) else 'none'}"


def _words(value: Any, now: float) -> str:
    """A part of a decision, in short."""
    match value:
        case None:
            return "none"
        case Dispatch():
            ids = ", ".join(value.request_ids[:4])
            more = len(value.request_ids) - 4
            return f"{value.replica}: {ids}{f' and {more} more' if more > 0 else ''}"
        case Promise():
            sure = "" if value.p_meet is None else f", {value.p_meet:.0%} sure"
            by = f"by +{value.finish_p50 - now:.3f} s (p90 +{value.finish_p90 - now:.3f} s)"
            return f"{by}{sure}, {value.queue_position} ahead; {value.reason}".rstrip("; ")
        case Refusal():
            return f"{value.request_id}: {'expired' if value.expired else 'infeasible'}"
    return str(value)
