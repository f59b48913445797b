"""Why a request was answered when it was, or was not."""

from collections.abc import Iterable, Sequence

from uellm.core.durations import show_duration
from uellm.decisions.causes import causes, counterfactuals
from uellm.decisions.explanation import (
    Cause,
    Counterfactual,
    Explanation,
    Facts,
    Names,
)
from uellm.decisions.records import DispatchRecord, Record
from uellm.decisions.story import Story, story_of
from uellm.decisions.timeline import events, first_promise, phases

EXPLAINED_SHARE = 0.1
"""What took less than this share of a request's time is no reason to name in one sentence."""


def explain(facts: Facts, records: Iterable[Record], now: float, dropped: int = 0) -> Explanation:
    """Explain a request.

    Args:
        facts: what is stored of it.
        records: what was decided while it waited and ran.
        now: in seconds since the epoch by Redis TIME.
        dropped: decisions of that time that were not recorded.
    """
    records = list(records)
    story = story_of(facts.request_id, records)
    names = Names(facts.tenant, {**story.tenants, facts.request_id: facts.tenant})
    why = causes(facts, story, names, now)
    what_if = counterfactuals(facts, story, names)
    return Explanation(
        summary=_summary(facts, story, why, what_if, now),
        promise=first_promise(facts, story),
        phases=tuple(phases(facts, story, now)),
        events=tuple(events(facts, story, names)),
        causes=tuple(why),
        counterfactuals=tuple(what_if),
        notes=tuple(_notes(facts, story, records, dropped)),
    )


def _summary(
    facts: Facts,
    story: Story,
    why: Sequence[Cause],
    what_if: Sequence[Counterfactual],
    now: float,
) -> str:
    sentences = [_verdict(facts, story, now)]
    total = (facts.finished_at or now) - facts.slo.accepted_at
    main = next((c for c in why if (c.seconds or 0.0) > EXPLAINED_SHARE * total), None)
    if main is not None and main.seconds is not None:
        sentences.append(f"Mostly ({show_duration(main.seconds)}): {main.text}.")
    # One that promised too late said nothing of what it took in the end.
    told = (c.text for c in what_if if facts.answered_at is None or c.seconds_earlier < total)
    text = next(told, None)
    if text is not None:
        sentences.append(f"{text[0].upper()}{text[1:]}.")
    return " ".join(sentences)


def _verdict(facts: Facts, story: Story, now: float) -> str:
    took = show_duration((facts.finished_at or now) - facts.slo.accepted_at)
    match facts.state:
        case "DONE":
            said = f"Answered after {took}{_against_deadline(facts)}{_promised(facts, story)}"
        case "QUEUED":
            said = f"Waits in the queue for {took} so far{_ahead_now(facts, story)}"
        case "LEASED" | "RUNNING":
            said = f"Is at a replica, {took} after it was accepted"
        case "CANCELLED":
            said = f"Cancelled after {took}"
        case "EXPIRED":
            where = " in the queue" if facts.dispatched_at is None else ""
            said = f"Expired after {took}{where}: {facts.message}"
        case "FAILED" if facts.refused:
            said = f"Refused after {took}: {facts.message}"
        case state:
            what = "Given up" if state == "DEAD" else "Failed"
            said = f"{what} after {took}: {facts.message}"
    return f"{said}."


def _ahead_now(facts: Facts, story: Story) -> str:
    if not story.waited:
        return ""
    order = list(story.waited[-1].decision.order)
    return f", {order.index(facts.request_id)} ahead of it"


def _against_deadline(facts: Facts) -> str:
    end, slo = facts.finished_at, facts.slo
    words = []
    if slo.deadline_at is not None and end is not None:
        words.append(_side(slo.deadline_at - end, "its deadline"))
    if slo.ttft_at is not None and facts.first_token_at is not None:
        words.append(f"its first token {_side(slo.ttft_at - facts.first_token_at, 'due')}")
    return f", {' and '.join(words)}" if words else ""


def _promised(facts: Facts, story: Story) -> str:
    promise, end = first_promise(facts, story), facts.finished_at
    if promise is None or end is None:
        return ""
    left = promise.finish_p90 - end
    kept = "kept" if left >= 0 else "missed"
    return f"; its promise was {kept}, {_side(left, 'its p90')}"


def _side(left: float, what: str) -> str:
    return f"{show_duration(abs(left))} {'before' if left >= 0 else 'after'} {what}"


def _notes(facts: Facts, story: Story, records: Sequence[Record], dropped: int) -> Iterable[str]:
    if not records:
        yield (
            "no decisions of that time are on record: they are kept for a while only "
            "(UELLM_DECISIONS_KEPT), or a moment from now; what is told is what is stored of the "
            "request itself"
        )
    elif story.promised is None and facts.promise is not None:
        yield "the decision that first promised it is not on record any more"
    used = {repr(record.policy): record.policy for record in records}
    missing = {policy.name for policy in used.values() if policy.made() is None}
    if missing:
        yield (
            f"policy {', '.join(sorted(missing))} is not installed here: nothing was decided again"
        )
    if dropped:
        yield f"{dropped} decisions of that time were not recorded: there were too many"
    if any(isinstance(record, DispatchRecord) and record.truncated for record in records):
        yield (
            "the queue was too long to be recorded whole: who was far behind is not on record "
            "(UELLM_SCHEDULER_RECORDED_REQUESTS)"
        )
