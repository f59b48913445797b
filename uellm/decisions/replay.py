"""Recorded decisions, decided again: by the policy that decided them, or by another."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from uellm.core.errors import InvalidArgumentError
from uellm.decisions.records import (
    DispatchPolicyUsed,
    DispatchRecord,
    Record,
    StepPolicyUsed,
)
from uellm.policy.registry import (
    dispatch_policies,
    dispatch_settings,
    step_policies,
    step_settings,
)
from uellm.policy.views import Dispatch, DispatchSettings

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
        settings: of the policy, or of every policy (``DispatchSettings``), by name.

    Raises:
        InvalidArgumentError: if neither level has such a policy, or such a setting.
    """

    policy: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = sorted({*dispatch_policies(), *step_policies()})
        if self.policy and self.policy not in known:
            raise InvalidArgumentError(
                f"policy: no {self.policy!r}; available: {', '.join(known)}", field="policy"
            )

    def dispatch(self, used: DispatchPolicyUsed) -> DispatchPolicyUsed | None:
        """What decides at level one; None if the policy has no such half."""
        name = self.policy or used.name
        if name not in dispatch_policies():
            return None
        general = {each.name: type(each.default) for each in fields(DispatchSettings)}
        shared = {n: _number(n, v, general[n]) for n, v in self.settings.items() if n in general}
        own = _known(self.settings, dispatch_settings(name), step_settings(name), general)
        kept = used.options if name == used.name else {}
        settings = replace(used.settings, **shared)
        return DispatchPolicyUsed(name, settings, {**kept, **own})

    def step(self, used: StepPolicyUsed) -> StepPolicyUsed | None:
        """What decides at level two; None if the policy has no such half."""
        name = self.policy or used.name
        if name not in step_policies():
            return None
        general = {each.name: type(each.default) for each in fields(DispatchSettings)}
        own = _known(self.settings, step_settings(name), dispatch_settings(name), general)
        kept = used.options if name == used.name else {}
        return StepPolicyUsed(name, {**kept, **own})


def _known(
    given: Mapping[str, str],
    own: Mapping[str, Any],
    other: Mapping[str, Any],
    general: Mapping[str, Any],
) -> dict[str, str]:
    """The settings of one half of a policy, of those given for both.

    Raises:
        InvalidArgumentError: if one is of neither half.
    """
    for name in given:
        if name not in own and name not in other and name not in general:
            known = ", ".join(sorted({*own, *other, *general}))
            raise InvalidArgumentError(f"{name}: no such setting; available: {known}", field=name)
    return {name: value for name, value in given.items() if name in own}


def _number(name: str, text: str, kind: type) -> Any:
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
    makers: dict[str, Any] = {}
    for record in records:
        if record.truncated:
            result.truncated += 1
            continue
        used = (
            instead.dispatch(record.policy)
            if isinstance(record, DispatchRecord)
            else instead.step(record.policy)
        )
        if used is None:
            continue
        # What policies keep between decisions changes time only.
        policy = makers.get(repr(used)) or makers.setdefault(repr(used), used.make())
        if isinstance(record, DispatchRecord):
            result.dispatches += 1
            again = policy.dispatch(record.queue, record.replicas, record.now)
        else:
            result.steps += 1
            again = policy.step(record.engine, record.now)
        result.take(differences(record, again))
    return result


def differences(record: Record, again: Any) -> list[Difference]:
    """How a decision that was made again differs, by its fields."""
    recorded = record.decision
    found = []
    for each in fields(recorded):
        before, after = getattr(recorded, each.name), getattr(again, each.name)
        if before != after:
            found.append(Difference(record.now, each.name, *_described(before, after)))
    return found


def _described(before: Any, after: Any) -> tuple[str, str]:
    """Both sides where they first differ."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        name = next(n for n in [*before, *after] if before.get(n) != after.get(n))
        return _item(name, before.get(name)), _item(name, after.get(name))
    if isinstance(before, Sequence) and isinstance(after, Sequence):
        place = next(
            (i for i, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]),
            min(len(before), len(after)),
        )
        return _at(before, place), _at(after, place)
    return str(before), str(after)


def _item(name: str, value: Any) -> str:
    return f"{name}: {'none' if value is None else value}"


def _at(values: Any, place: int) -> str:
    if place >= len(values):
        return f"[{place}] none"
    value = values[place]
    if isinstance(value, Dispatch):
        ids = ", ".join(value.request_ids[:4])
        more = f" and {len(value.request_ids) - 4} more" if len(value.request_ids) > 4 else ""
        return f"[{place}] {value.replica}: {ids}{more}"
    return f"[{place}] {value}"
