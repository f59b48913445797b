"""What an owner learns of its promises belongs to the policy they were made under."""

from typing import Any, cast

import numpy as np
import pytest
from uellm_scheduler.keeping import Keeping

from uellm.policy.forecast import FEATURES
from uellm.policy.margin import FIRST, MOST
from uellm.policy.prospects import Forecasts
from uellm.policy.track_record import TrackRecord
from uellm.policy.track_records import TrackRecords
from uellm.prediction.states import pack
from uellm.v1 import common_pb2, queue_pb2


def _asked(name: str) -> Forecasts:
    row = np.full(1, np.inf)
    return Forecasts(
        ids=[name],
        kind=np.zeros(1),
        start=np.ones(1),
        finish=np.full(1, 10.0),
        drained=np.full(1, 10.0),
        spread=np.full(1, 0.5),
        ttft=row,
        deadline=row,
        features=np.zeros((1, FEATURES)),
    )


def _serve(keeping: Keeping, name: str, since: float, seconds: float) -> None:
    keeping.record.prospects(_asked(name), since)
    keeping.promised([name], since)
    event = queue_pb2.CompletionEvent(
        request_id=name,
        finished_ms=int((since + seconds) * 1000),
        finish_reason=common_pb2.FINISH_REASON_STOP,
    )
    keeping.heard([event])


def _width(record: TrackRecord, now: float) -> float:
    low, high = record.prospects(_asked("asked"), now).times[0, 1] - now
    return float(high / low)


def test_each_policy_has_a_record_of_its_own_and_comes_back_to_it() -> None:
    keeping = Keeping(cast(Any, None), "cslo-odbs")
    for i in range(100):
        _serve(keeping, f"r{i}", 100.0 * i, 10.0 + i % 3)
    assert _width(keeping.record, 1e5) < 1.5
    keeping.under("fcfs")
    assert _width(keeping.record, 1e5) > 3
    keeping.under("cslo-odbs")
    assert _width(keeping.record, 1e5) < 1.5


def test_an_end_is_told_to_the_policy_that_promised() -> None:
    keeping = Keeping(cast(Any, None), "cslo-odbs")
    first = keeping.record
    first.prospects(_asked("r"), 1000.0)
    keeping.promised(["r"], 1000.0)
    keeping.under("fcfs")
    keeping.heard(
        [
            queue_pb2.CompletionEvent(
                request_id="r",
                finished_ms=1_010_000,
                finish_reason=common_pb2.FINISH_REASON_STOP,
            )
        ]
    )
    assert first.state()["all.took"][0, 1] == 10
    assert len(keeping.record.state()["all.took"]) == 0


@pytest.mark.parametrize(
    ("kept", "margin"), [(0.3, 0.3), (7.0, MOST), (np.nan, FIRST), ([0.1, 0.2], FIRST)]
)
async def test_a_margin_that_makes_no_sense_ends_nothing(kept: Any, margin: float) -> None:
    class Kept:
        model = "m"

        async def track_record(self) -> bytes:
            return pack(TrackRecords().state() | {"margin": np.array(kept)})

    keeping = Keeping(cast(Any, Kept()), "cslo-odbs")
    await keeping.load()
    assert keeping.admissions.margin.value == margin


class Redis:
    """What an owner keeps, and the next one finds."""

    model = "m"
    kept = b""

    async def track_record(self) -> bytes:
        return self.kept

    async def keep_track_record(self, token: int, packed: bytes) -> None:
        self.kept = packed


async def test_the_next_owner_goes_on_with_the_price_and_the_door() -> None:
    queue = cast(Any, Redis())
    keeping = Keeping(queue, "cslo-odbs")
    _serve(keeping, "r", 100.0, 10.0)
    keeping.admissions.price.learn([2.0] * 10, [2.0] * 90)
    for second in range(20):
        keeping.admissions.shedding.learn(1000, 10, 1000.0 + second)
    await keeping.save(1, 1020.0)
    heir = Keeping(queue, "cslo-odbs")
    await heir.load()
    assert heir.admissions.price.value == keeping.admissions.price.value < np.inf
    share = keeping.admissions.shedding.share
    assert heir.admissions.shedding.share == share < 0.2
    # By what it sees itself the door opens, or stays as it is.
    heir.advance(1021.0)
    assert share < heir.admissions.shedding.share < 1
    heir.advance(1060.0)
    assert heir.admissions.shedding.share == 1


async def test_a_record_is_kept_for_the_policy_that_it_was_made_under() -> None:
    queue = cast(Any, Redis())
    keeping = Keeping(queue, "cslo-odbs")
    for i in range(100):
        _serve(keeping, f"r{i}", 100.0 * i, 10.0 + i % 3)
    await keeping.save(1, 1e4)
    heir = Keeping(queue, "fcfs")
    await heir.load()
    assert _width(heir.record, 1e5) > 3
    heir.under("cslo-odbs")
    assert _width(heir.record, 1e5) < 1.5
