"""A policy as it is chosen for a model: one name and its settings for both levels."""

from pathlib import Path

import pytest

from tests.support.policies import NOW, engine, sequence
from uellm.class_defaults import check_class_defaults, with_defaults
from uellm.convert import duration
from uellm.core.errors import InvalidArgumentError
from uellm.policy.choice import LEVELS, PolicyChoice, levels_of, policies, settings_of
from uellm.v1.common_pb2 import PRIORITY_BATCH, PRIORITY_INTERACTIVE, ModelPolicy, Slo


def test_every_policy_can_be_chosen_as_it_is() -> None:
    for name in policies():
        choice = PolicyChoice(name)
        choice.check()
        assert levels_of(name) == LEVELS
        dispatch, step = choice.dispatch(), choice.step()
        assert dispatch is not None
        assert step is not None
        assert dispatch.name == step.name == name


def test_a_setting_goes_to_every_level_that_has_it_and_a_prefix_to_one() -> None:
    choice = PolicyChoice(
        "cslo-odbs",
        {
            "urgent_steps": "10",
            "step.urgent_steps": "20",
            "keep_up": "3",
            "dispatch.caution": "0.25",
        },
    )
    choice.check()
    assert choice.at("dispatch") == {"urgent_steps": "10", "caution": "0.25"}
    assert choice.at("step") == {"urgent_steps": "20", "keep_up": "3"}
    values = {level: settings_of(choice, level) for level in LEVELS}
    assert values["step"]["urgent_steps"][:2] == ("20", "60.0")
    assert values["dispatch"]["urgent_steps"][:2] == ("10", "120.0")
    assert values["step"]["caution"][0] == values["step"]["caution"][1]


def test_settings_are_in_force() -> None:
    waiting = [sequence(str(i)) for i in range(30)]
    view = engine([], waiting, slots=32, kv_tokens_total=100_000)
    step = PolicyChoice("fifo", {"most_requests": "3"}).step()
    assert step is not None
    assert len(step.step(view, NOW).admit) == 3


@pytest.mark.parametrize(
    ("choice", "field", "message"),
    [
        (PolicyChoice("magic"), "policy", "no 'magic'; available: cslo-odbs, edf"),
        (PolicyChoice("fcfs", {"speed": "9"}), "speed", "no such setting of fcfs; available: knee"),
        (
            PolicyChoice("cslo-odbs", {"dispatch.keep_up": "0"}),
            "dispatch.keep_up",
            "available: ahead_alone, .*, urgent_beyond, urgent_steps; at level dispatch$",
        ),
        (PolicyChoice("fcfs", {"dispatch.watermark": "0"}), "dispatch.watermark", "no such"),
        (PolicyChoice("fcfs", {"watermark": "2"}), "watermark", "2 must be at most 0.9"),
        (PolicyChoice("fcfs", {"step.watermark": "x"}), "watermark", "'x' is not a number"),
        (PolicyChoice("fcfs", {}, "magic"), "execution", "one of continuous, static"),
    ],
)
def test_what_is_wrong_is_named(choice: PolicyChoice, field: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message) as error:
        choice.check()
    assert error.value.field == field


def test_a_package_may_offer_a_policy_at_one_level_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "newest.py").write_text(
        "from uellm.policy.views import StepDecision\n"
        "class Newest:\n"
        "    name = 'newest'\n"
        "    def __init__(self, settings=None):\n"
        "        self.most = int((settings or {}).get('most', 9))\n"
        "    def step(self, engine, now):\n"
        "        return StepDecision(tuple(s.request_id for s in engine.waiting[-self.most:]))\n"
    )
    about = tmp_path / "newest-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: newest\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[uellm.step_policies]\nnewest = newest:Newest\n")
    monkeypatch.syspath_prepend(tmp_path)
    choice = PolicyChoice("newest", {"most": "1"})
    choice.check()
    assert levels_of("newest") == ("step",)
    assert choice.dispatch() is None
    step = choice.step()
    assert step is not None
    assert step.step(engine([], [sequence("a"), sequence("b")]), NOW).admit == ("b",)
    with pytest.raises(InvalidArgumentError, match="settings: newest: invalid literal"):
        PolicyChoice("newest", {"most": "many"}).check()


# ---- what classes need -------------------------------------------------------------------------


def test_requests_that_do_not_say_need_what_their_class_does() -> None:
    defaults = {
        "interactive": Slo(ttft=duration(2), tpot=duration(0.1)),
        "normal": Slo(deadline=duration(60)),
    }
    check_class_defaults(ModelPolicy(class_defaults=defaults))
    urgent = with_defaults(Slo(priority=PRIORITY_INTERACTIVE), defaults)
    assert urgent == Slo(priority=PRIORITY_INTERACTIVE, ttft=duration(2), tpot=duration(0.1))
    assert with_defaults(Slo(), defaults) == Slo(deadline=duration(60))
    # What was asked for stands, all of it; and so does what no class has a word for.
    own = Slo(priority=PRIORITY_INTERACTIVE, deadline=duration(5))
    assert with_defaults(own, defaults) == own
    assert with_defaults(Slo(priority=PRIORITY_BATCH), defaults) == Slo(priority=PRIORITY_BATCH)
    assert with_defaults(Slo(), {}) == Slo()


@pytest.mark.parametrize(
    ("defaults", "field", "message"),
    [
        ({"vip": Slo(ttft=duration(1))}, "class.vip", "no such class; one of batch, normal"),
        ({"batch": Slo()}, "class.batch", "at least one of deadline, ttft, tpot"),
        ({"batch": Slo(ttft=duration(0))}, "class.batch.ttft", "more than 0"),
        ({"batch": Slo(deadline=duration(1e6))}, "class.batch.deadline", "at most 86400 s"),
        (
            {"normal": Slo(ttft=duration(9), deadline=duration(5))},
            "class.normal.ttft",
            "later than the deadline",
        ),
    ],
)
def test_class_defaults_that_make_no_sense_are_refused(
    defaults: dict[str, Slo], field: str, message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message) as error:
        check_class_defaults(ModelPolicy(class_defaults=defaults))
    assert error.value.field == field
