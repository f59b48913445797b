"""Promises are kept as often as they say: quantiles, odds, and what they may be learnt from."""

from dataclasses import fields, replace
from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.room import room
from uellm.policy.columns import BEGUN, Floats
from uellm.policy.forecast import FEATURES
from uellm.policy.prospects import Forecasts
from uellm.policy.track_record import TrackRecord
from uellm.policy.track_records import TrackRecords

FINISH, START = 1, 0


def forecast(
    finish: float = 10.0,
    *,
    start: float = 1.0,
    deadline: float = inf,
    ttft: float = inf,
    features: tuple[float, ...] = (),
) -> Forecasts:
    row = np.zeros((1, FEATURES))
    row[0, : len(features)] = features
    return Forecasts(
        ids=["asked"],
        kind=np.array([8.0 + 2 * (deadline < inf) + (ttft < inf)]),
        start=np.array([start]),
        finish=np.array([finish]),
        drained=np.array([finish]),
        spread=np.array([0.5]),
        ttft=np.array([ttft]),
        deadline=np.array([deadline]),
        features=row,
    )


def promise(record: TrackRecord, name: str, asked: Forecasts, now: float) -> tuple[Floats, float]:
    """What a request is promised: seconds by target and level, and the odds."""
    record.advance(now)
    found = record.prospects(replace(asked, ids=[name]), now)
    record.promised(name, now)
    return found.times[0] - now, float(found.p_meet[0])


def serve(
    record: TrackRecord, asked: Forecasts, took: list[float], every: float = 1000.0
) -> list[tuple[Floats, float]]:
    """Promise to one request after the other, each of which takes so long."""
    given = []
    for i, seconds in enumerate(took):
        now = i * every
        given.append(promise(record, f"r{i}", asked, now))
        record.advance(now + seconds)
        record.first_token(f"r{i}", now + min(asked.start[0], seconds))
        record.finished(f"r{i}", now + seconds)
    return given


def test_ignorance_is_wide_and_knowledge_narrow() -> None:
    record = TrackRecord()
    took = 10 * np.random.default_rng(0).lognormal(0, 0.05, 200)
    given = serve(record, forecast(), took.tolist())
    first, last = given[0][0][FINISH], given[-1][0][FINISH]
    assert first[1] / first[0] > 2
    assert last == pytest.approx([10.0, 10.0], rel=0.15)


def test_what_resembles_nothing_known_is_promised_widely() -> None:
    record = TrackRecord()
    serve(record, forecast(), (10 * np.random.default_rng(0).lognormal(0, 0.05, 200)).tolist())
    known = (record.prospects(forecast(), 1e6).times - 1e6)[0, FINISH]
    strange = (record.prospects(forecast(features=(5.0,)), 1e6).times - 1e6)[0, FINISH]
    assert known[1] / known[0] < 1.2
    assert strange[1] / strange[0] > 3


@pytest.mark.parametrize("waits", [False, True])
def test_a_new_mesh_promises_what_a_forecast_is_worth(waits: bool) -> None:
    """With time in plenty, sharply and all but surely; with little, no sooner than is asked."""
    features = (1.0,) if waits else ()
    near = TrackRecord().prospects(forecast(deadline=15.0, features=features), 0.0)
    assert near.p_meet[0] < 0.9
    assert near.times[0, FINISH, 1] >= 15.0
    plenty = TrackRecord().prospects(forecast(deadline=1e4, features=features), 0.0)
    assert 0.9 < plenty.p_meet[0] < 0.99
    assert plenty.times[0, FINISH, 1] < 100.0


def test_short_answers_with_slots_free_do_not_shorten_the_first_queue() -> None:
    """Deadlines told how long answers are, while nobody waited; the wait is none of that."""
    rng, record = np.random.default_rng(14), TrackRecord()
    for i in range(60):
        now, slack = 100.0 * i, float(rng.uniform(-2, 2))
        asked = forecast(deadline=10 * np.exp(slack), features=(0.0, slack))
        promise(record, f"r{i}", asked, now)
        record.advance(now + 4 * np.exp(slack))
        record.finished(f"r{i}", now + 4 * np.exp(slack))
    queued = forecast(300.0, deadline=60.0, features=(3.0, -2.0))
    found = record.prospects(queued, 1e5)
    assert found.p_meet[0] < 0.3
    assert found.times[0, FINISH, 0] - 1e5 > 60.0


def test_who_waits_does_not_spoil_the_promises_of_who_does_not() -> None:
    """A jam breaks promises by the dozen; those that find a slot free were right all the time."""
    record = TrackRecord()
    rng = np.random.default_rng(8)
    free, jammed = forecast(), forecast(features=(0.5,))
    serve(record, free, (10 * rng.lognormal(0, 0.1, 200)).tolist())
    before = (record.prospects(free, 1e6).times - 1e6)[0, FINISH, 1]
    for i in range(100):
        promise(record, f"jammed{i}", jammed, 1e6 + i)
    record.advance(2e6)
    assert (record.prospects(free, 2e6).times - 2e6)[0, FINISH, 1] == pytest.approx(before)


def test_those_that_end_first_do_not_speak_for_those_that_go_on() -> None:
    """A new mesh: when a tenth of the answers is there, these are the shortest."""
    kept = []
    for seed in range(10):
        rng, record = np.random.default_rng(seed), TrackRecord()
        took = 100 * rng.lognormal(0, 0.6, 120)
        ends = sorted((i + seconds, f"r{i}") for i, seconds in enumerate(took))
        for i, seconds in enumerate(took):
            while ends[0][0] <= i:
                at, name = ends.pop(0)
                record.first_token(name, at)
                record.finished(name, at)
            times, _ = promise(record, f"r{i}", forecast(100.0), float(i))
            kept.append(times[FINISH, 1] >= seconds)
    assert np.mean(np.reshape(kept, (10, -1))[:, 40:]) == pytest.approx(0.9, abs=0.05)


def test_broken_promises_count_no_less_for_coming_in_bursts() -> None:
    """Of each crowd a fifth takes ten times as long, and is heard of when all others are."""
    rng, record = np.random.default_rng(10), TrackRecord()
    kept = []
    for number in range(60):
        since = 1e4 * number
        names = [f"{number}.{i}" for i in range(40)]
        record.advance(since)
        asked = replace(forecast().some(np.zeros(40, dtype=np.intp)), ids=names)
        found = record.prospects(asked, since)
        for name in names:
            record.promised(name, since)
        took = 10 * rng.lognormal(0, 0.2, 40) * np.where(np.arange(40) % 5, 1.0, 10.0)
        kept.append(np.mean(found.times[:, FINISH, 1] - since >= took))
        for at in np.sort(took):
            record.advance(since + at)
            for i in np.flatnonzero(took == at):
                record.finished(names[i], since + at)
    assert np.mean(kept[10:]) == pytest.approx(0.9, abs=0.03)


def test_who_misses_a_first_token_may_still_be_as_fast_as_others() -> None:
    """One in five begins late, and takes no longer: quantiles of the end are those of all."""
    rng, record = np.random.default_rng(11), TrackRecord()
    given = []
    for i, took in enumerate(10 * rng.lognormal(0, 0.5, 600)):
        now = 1000.0 * i
        given.append(promise(record, f"r{i}", forecast(ttft=1.0), now))
        first = 0.2 * took if rng.random() < 0.2 else 0.5
        record.advance(now + first)
        record.first_token(f"r{i}", now + first)
        record.finished(f"r{i}", now + took)
    times, odds = zip(*given[200:], strict=True)
    assert np.mean(odds) == pytest.approx(0.83, abs=0.05)
    quantiles = 10 * np.exp(0.5 * np.array([0.0, 1.2816]))
    assert np.mean(times, axis=0)[FINISH] == pytest.approx(quantiles, rel=0.1)


@pytest.mark.parametrize("handed_on", [False, True])
def test_empty_answers_say_nothing_of_when_others_begin(handed_on: bool) -> None:
    """They end without a first token: nobody still waits for that, and it is not late either."""
    rng, record = np.random.default_rng(12), TrackRecord()
    asked = forecast(deadline=15.0)
    for i, took in enumerate(10 * rng.lognormal(0, 0.5, 200)):
        now = 100.0 * i
        promise(record, f"r{i}", asked, now)
        if i % 5:
            record.advance(now + 1.0)
            record.first_token(f"r{i}", now + 1.0)
        record.advance(now + took)
        record.finished(f"r{i}", now + took)
    if handed_on:
        kept, record = record.state(), TrackRecord()
        record.load(kept)
    found = record.prospects(asked, 1e6)
    assert (found.times - 1e6)[0, START] == pytest.approx([1.0, 1.0], rel=0.15)
    assert np.isfinite(found.times).all()
    assert np.isfinite(found.p_meet).all()


@pytest.mark.parametrize("bias", [0.3, 1.0, 4.0])
def test_a_biased_forecast_is_put_right(bias: float) -> None:
    rng = np.random.default_rng(1)
    took = (10 * bias * rng.lognormal(0, 0.6, 1500)).tolist()
    given = serve(TrackRecord(), forecast(), took)
    kept = np.array([times[FINISH] >= t for (times, _), t in zip(given, took, strict=True)])
    assert kept[100:].mean(axis=0) == pytest.approx([0.5, 0.9], abs=0.02)
    truth = 10 * bias * np.exp(0.6 * np.array([0.0, 1.2816]))
    assert np.mean([b[FINISH] for b, _ in given[-300:]], axis=0) == pytest.approx(truth, rel=0.25)


def test_coverage_follows_when_the_traffic_changes() -> None:
    rng = np.random.default_rng(2)
    took = (
        10 * np.concatenate([rng.lognormal(0, 0.3, 800), rng.lognormal(1.5, 0.8, 800)])
    ).tolist()
    given = serve(TrackRecord(), forecast(), took)
    kept = np.array([b[FINISH, 1] >= t for (b, _), t in zip(given, took, strict=True)])
    assert kept[900:].mean() == pytest.approx(0.9, abs=0.03)


def test_many_of_one_time_do_not_crowd_out_other_times() -> None:
    """Requests that wait in one queue share their fate: a crowd is early or late together."""
    kept = []
    for seed in range(4):
        rng, record = np.random.default_rng(seed), TrackRecord()
        for number in range(40):
            since, took = 1e4 * number, 10 * float(rng.lognormal(0, 0.5))
            names = [f"{number}.{i}" for i in range(100)]
            record.advance(since)
            asked = replace(forecast().some(np.zeros(100, dtype=np.intp)), ids=names)
            found = record.prospects(asked, since)
            for name in names:
                record.promised(name, since)
            if number >= 5:
                kept.append(found.times[:, FINISH, 1].mean() - since >= took)
            record.advance(since + took)
            for name in names:
                record.finished(name, since + took)
    assert np.mean(kept) >= 0.8


def test_who_cannot_have_their_turn_in_time_are_told_before_the_first_is_late() -> None:
    """A queue that grows slowly: the odds fall when the turn nears the limit, not when it passed.

    Times are known to a hundredth, so nothing but the limit makes the outcome uncertain.
    """
    rng = np.random.default_rng(9)
    record = TrackRecord()
    said = []
    for i in range(900):
        finish = 1.0 + 0.02 * i
        asked = forecast(finish, deadline=15.0, features=(np.log(finish), np.log(15.0 / finish)))
        _, odds = promise(record, f"r{i}", asked, 100.0 * i)
        took = 2 * finish * float(rng.lognormal(0, 0.01))
        said.append((odds, took <= 15.0))
        record.advance(100.0 * i + took)
        record.finished(f"r{i}", 100.0 * i + took)
    odds, true = np.array(said, dtype=float)[100:].T
    assert np.mean((odds - true) ** 2) < 0.02


def test_odds_come_true() -> None:
    rng = np.random.default_rng(3)
    took = (10 * rng.lognormal(0.5, 0.6, 1500)).tolist()
    for deadline in (10.0, 20.0, 40.0):
        given = serve(TrackRecord(), forecast(deadline=deadline), took)
        said = np.mean([chance for _, chance in given[200:]])
        assert said == pytest.approx(np.mean(np.array(took) <= deadline), abs=0.05)


def test_those_in_time_are_known_first_and_do_not_speak_for_those_that_go_on() -> None:
    """Of each crowd one in two is late, which is known when its time has passed and not before."""
    rng, record = np.random.default_rng(13), TrackRecord()
    asked, said = forecast(deadline=100.0, features=(1.0,)), []
    for number in range(12):
        since = 1e4 * number
        late = rng.random(40) < 0.5
        for i in range(40):
            promise(record, f"{number}.{i}", asked, since + 0.01 * i)
        for i in np.flatnonzero(~late):
            record.finished(f"{number}.{i}", since + 5.0)
        record.advance(since + 50.0)
        said.append(float(record.prospects(asked, since + 50.0).p_meet[0]))
        record.advance(since + 200.0)
        for i in np.flatnonzero(late):
            record.finished(f"{number}.{i}", since + 300.0)
    assert np.mean(said[4:]) == pytest.approx(0.5, abs=0.1)


def test_a_long_deadline_need_not_pass_before_it_is_known_that_all_are_in_time() -> None:
    record = TrackRecord()
    asked = forecast(deadline=1e5, features=(1.0, 3.0))
    before, *_, after = (odds for _, odds in serve(record, asked, [10.0] * 40, every=20.0))
    assert before < after
    assert after > 0.98


def test_a_first_token_that_is_asked_for_has_odds_too() -> None:
    record = TrackRecord()
    for i in range(300):
        now = 100.0 * i
        promise(record, f"r{i}", forecast(ttft=2.0), now)
        record.advance(now + 50)
        record.first_token(f"r{i}", now + 50)
        record.finished(f"r{i}", now + 60)
    assert record.prospects(forecast(ttft=2.0), 1e6).p_meet[0] < 0.05
    # Who asks for nothing has no odds.
    assert np.isnan(record.prospects(forecast(), 1e6).p_meet[0])


def test_who_resembles_the_asked_counts_most() -> None:
    record = TrackRecord()
    rng = np.random.default_rng(4)
    for i in range(600):
        slow = i % 2
        asked = forecast(features=(4.0 * slow,))
        took = (100.0 if slow else 10.0) * float(rng.lognormal(0, 0.1))
        promise(record, f"r{i}", asked, 1000.0 * i)
        record.finished(f"r{i}", 1000.0 * i + took)
    for slow, truth in ((0, 10.0), (1, 100.0)):
        found = record.prospects(forecast(features=(4.0 * slow,)), 1e9)
        assert found.times[0, FINISH, 0] - 1e9 == pytest.approx(truth, rel=0.15)


def test_a_broken_promise_counts_before_its_request_ends() -> None:
    record = TrackRecord()
    serve(record, forecast(), [10.0] * 300)
    before = (record.prospects(forecast(), 1e6).times - 1e6)[0, FINISH, 1]
    for i in range(200):
        promise(record, f"stuck{i}", forecast(), 1e6 + i)
    record.advance(2e6)
    assert (record.prospects(forecast(), 2e6).times - 2e6)[0, FINISH, 1] >= before
    assert record.shifts(2 * 8)[FINISH, 1] > 0


def test_who_is_cancelled_is_known_to_have_taken_longer() -> None:
    patient, cut = TrackRecord(), TrackRecord()
    rng = np.random.default_rng(5)
    for i, seconds in enumerate(10 * rng.lognormal(0, 0.8, 800)):
        now = 1000.0 * i
        for record in (patient, cut):
            promise(record, f"r{i}", forecast(), now)
        patient.finished(f"r{i}", now + seconds)
        if i % 2 and seconds > 12:
            cut.gone(f"r{i}", now + 12)
        else:
            cut.finished(f"r{i}", now + seconds)
    truth = 10 * np.exp(0.8 * 1.2816)
    for record in (patient, cut):
        found = (record.prospects(forecast(), 1e9).times - 1e9)[0, FINISH, 1]
        assert found == pytest.approx(truth, rel=0.35)


def test_a_successor_goes_on_from_what_was_kept() -> None:
    record = TrackRecord()
    rng = np.random.default_rng(6)
    serve(record, forecast(deadline=30.0), (20 * rng.lognormal(0, 0.5, 400)).tolist())
    heir = TrackRecord()
    heir.load(record.state())
    for asked in (forecast(deadline=30.0), forecast(finish=99.0, deadline=30.0)):
        mine, theirs = record.prospects(asked, 1e6), heir.prospects(asked, 1e6)
        assert theirs.times - 1e6 == pytest.approx(mine.times - 1e6, rel=1e-3)
        assert theirs.p_meet == pytest.approx(mine.p_meet, abs=1e-3)


def test_what_has_not_happened_yet_changes_nothing() -> None:
    """No promise depends on what comes after it."""
    rng = np.random.default_rng(7)
    took = (10 * rng.lognormal(0, 0.7, 200)).tolist()
    short = serve(TrackRecord(), forecast(deadline=20.0), took[:100])
    whole = serve(TrackRecord(), forecast(deadline=20.0), took)
    for (one, p_one), (other, p_other) in zip(short, whole[:100], strict=True):
        assert (one == other).all()
        assert p_one == p_other


OUTCOMES = st.lists(
    st.tuples(st.floats(0.01, 1e4), st.floats(0.01, 1e4), st.booleans(), st.floats(-3, 5)),
    max_size=120,
)


@given(OUTCOMES, st.floats(0.1, 1e4), st.sampled_from([1.0, 30.0, 1e3]))
def test_whatever_was_learnt_promises_are_coherent(
    outcomes: list[tuple[float, float, bool, float]], finish: float, deadline: float
) -> None:
    record = TrackRecord()
    now = 0.0
    for i, (first, rest, cancelled, feature) in enumerate(outcomes):
        now += 5.0
        promise(record, f"r{i}", forecast(finish, deadline=deadline, features=(feature,)), now)
        record.first_token(f"r{i}", now + first)
        if cancelled:
            record.gone(f"r{i}", now + first + rest)
        else:
            record.finished(f"r{i}", now + first + rest)
    asked = forecast(finish, deadline=deadline)
    found = record.prospects(asked, now)
    assert np.isfinite(found.times).all()
    assert (found.times >= now).all()
    assert (np.diff(found.times, axis=2) >= 0).all()
    assert (found.times[:, START] <= found.times[:, FINISH]).all()
    assert 0 <= found.p_meet[0] <= 1
    # Whoever is told a time before the deadline with 90 % is told the odds of that.
    high = found.times[0, FINISH, 1] - now
    assert (high <= deadline + 1e-6) if found.p_meet[0] >= 0.9 else (high >= deadline - 1e-6)
    # With more time, everything else alike, the turn comes no less likely in time.
    later = record.prospects(replace(asked, deadline=asked.deadline * 2), now)
    assert later.in_turn[0] >= found.in_turn[0] - 1e-9


def test_promises_to_who_is_being_answered_are_learnt_apart() -> None:
    waiting = forecast(10.0)
    begun = replace(waiting, kind=waiting.kind + BEGUN)
    both = replace(
        waiting,
        ids=["w", "b"],
        **{
            name: np.concatenate([getattr(waiting, name), getattr(begun, name)])
            for name in ("kind", "start", "finish", "drained", "spread", "ttft", "deadline")
        },
        features=np.concatenate([waiting.features, begun.features]),
    )
    records = TrackRecords()
    for i in range(300):
        now, name = i * 1000.0, f"r{i}"
        records.advance(now)
        records.prospects(replace(waiting, ids=[name]), now)
        records.promised(name, now)
        records.first_token(name, now + 90.0)
        records.advance(now + 90.0)
        records.prospects(replace(begun, ids=[name]), now + 90.0)
        # Asked again and again while the answer comes: it counts once.
        for _ in range(3):
            records.seen_begun(name, now + 90.0)
        # Ten times as slow as forecast, nearly all of it before the first token.
        records.finished(name, now + 100.0)
    now = 300_000.0
    times = records.prospects(both, now).times[:, 1] - now
    assert times[0] == pytest.approx([100.0, 100.0], rel=0.5)
    assert times[1] == pytest.approx([10.0, 10.0], rel=0.5)
    again = TrackRecords()
    again.load(records.state())
    expected = records.prospects(both, now).times
    np.testing.assert_allclose(again.prospects(both, now).times, expected)


def test_a_record_of_before_promises_were_revised_is_taken_over() -> None:
    old = TrackRecord()
    serve(old, forecast(10.0), [50.0] * 100)
    records = TrackRecords()
    records.load(old.state())
    times = records.prospects(forecast(10.0), 1e6).times[0, 1] - 1e6
    assert times[0] == pytest.approx(50.0, rel=0.3)


def test_a_request_that_had_a_day_and_has_ended_takes_no_room() -> None:
    record, one, most = TrackRecord(), forecast(deadline=86_400.0), [0, 0]
    columns = [getattr(one, each.name) for each in fields(one)[1:]]
    asked = Forecasts([], *(np.repeat(column, 32, axis=0) for column in columns))
    for turn in range(400):
        names = [f"{turn}.{i}" for i in range(32)]
        record.advance(float(turn))
        record.prospects(replace(asked, ids=names), float(turn))
        for name in names:
            record.promised(name, float(turn))
            record.gone(name, turn + 0.5)
        most[turn // 200] = max(most[turn // 200], room(record))
    assert most[1] < 1.1 * most[0]
