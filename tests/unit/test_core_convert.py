"""Between messages and plain data."""

from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from uellm import convert, convert_topology
from uellm.core.model import LayerProfile, ModelProfile
from uellm.core.request import (
    LEVELS,
    Priority,
    Promise,
    QuantileFunction,
    ResourceProfile,
    Slo,
)
from uellm.v1 import common_pb2

NOW = 1_800_000_000.0
_seconds = st.integers(0, 4_000_000_000_000).map(lambda ms: ms / 1000)


@given(_seconds)
def test_times_keep_their_microseconds(value: float) -> None:
    assert abs(convert.seconds(convert.timestamp(value)) - value) < 1e-6
    assert abs(convert.duration_seconds(convert.duration(value)) - value) < 1e-6


def test_an_slo_is_made_absolute() -> None:
    message = common_pb2.Slo(
        deadline=Duration(seconds=30),
        ttft=convert.duration(0.5),
        tpot=convert.duration(0.05),
        priority=common_pb2.PRIORITY_INTERACTIVE,
    )
    slo = convert.slo_from_proto(message, NOW)
    assert slo == Slo(NOW, NOW + 30, NOW + 0.5, 0.05, Priority.INTERACTIVE)


def test_what_was_not_asked_for_is_not_there() -> None:
    assert convert.slo_from_proto(common_pb2.Slo(), NOW) == Slo(NOW)


def test_a_deadline_of_nothing_is_a_deadline() -> None:
    slo = convert.slo_from_proto(common_pb2.Slo(deadline=Duration()), NOW)
    assert slo.deadline_at == NOW


def test_profiles_keep_everything() -> None:
    quantiles = QuantileFunction(LEVELS, [float(i) for i in range(len(LEVELS))])
    profile = ResourceProfile(7, quantiles, 1 << 40, 1e12, "prior", "3", fallback=True)
    message = convert.profile_to_proto(profile)
    assert convert.profile_from_proto(message) == profile
    assert message.mean_output_tokens == quantiles.mean


def test_models_keep_everything() -> None:
    layer = LayerProfile(10, 20, 30.0, 40)
    model = ModelProfile((layer, layer), 5, 6, True, 7, 8, 9, 10, "Arch", "float16")
    assert convert_topology.model_from_proto(convert_topology.model_to_proto(model)) == model


def test_promises_keep_everything_there_is() -> None:
    promise = Promise(NOW, NOW + 1, NOW + 2, NOW + 3, 0.5, 4, "edf", "why", 10, 20, plan_epoch=9)
    message = convert.promise_to_proto(promise, revision=2)
    assert message.revision == 2
    assert convert.seconds(message.finish_p90) == NOW + 3
    assert convert.promise_from_proto(message) == promise
    assert not message.HasField("earliest_feasible_finish")
    later = Promise(NOW, NOW, NOW, NOW, None, 0, "", "", 1, 1, earliest_feasible_finish=NOW + 9)
    message = convert.promise_to_proto(later, revision=1)
    assert not message.HasField("p_meet")
    assert convert.promise_from_proto(message) == later


def test_a_verdict_judges_only_what_was_asked_for() -> None:
    verdict = convert.verdict(Slo(NOW), NOW + 1, NOW + 2, 10)
    assert verdict.met
    assert not any(verdict.HasField(name) for name in ("deadline_met", "ttft_met", "tpot_met"))


@given(st.floats(0, 10), st.floats(0, 10), st.integers(0, 100))
def test_a_verdict_is_kept_only_if_every_part_is(first: float, rest: float, tokens: int) -> None:
    slo = Slo(NOW, deadline_at=NOW + 10, ttft_at=NOW + 5, tpot_seconds=0.1)
    first_at, finished_at = NOW + first, NOW + first + rest
    verdict = convert.verdict(slo, first_at, finished_at, tokens)
    assert verdict.deadline_met == (finished_at <= NOW + 10)
    assert verdict.ttft_met == (first_at <= NOW + 5)
    assert verdict.tpot_met == ((finished_at - first_at) / max(tokens - 1, 1) <= 0.1)
    assert verdict.met == (verdict.deadline_met and verdict.ttft_met and verdict.tpot_met)


def test_an_answer_without_tokens_began_when_it_ended() -> None:
    verdict = convert.verdict(Slo(NOW, ttft_at=NOW + 1), None, NOW + 2, 0)
    assert not verdict.ttft_met
    assert not verdict.met
