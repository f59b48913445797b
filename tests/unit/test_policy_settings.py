"""Settings of policies: what they are told, and what they answer to what makes no sense."""

import pytest

from uellm.core.errors import InvalidArgumentError
from uellm.policy.registry import step_policies, step_policy, step_settings


def test_every_built_in_policy_describes_its_settings_and_takes_its_defaults() -> None:
    for name in step_policies():
        described = step_settings(name)
        assert described
        assert all(text.endswith(".") for _, text in described.values())
        defaults = {setting: str(default) for setting, (default, _) in described.items()}
        assert step_policy(name, defaults).name == name


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("fcfs", {"watermark": 1.5}, "watermark: 1.5 must be at most 0.9"),
        ("fcfs", {"watermark": "-1"}, "watermark: -1 must be at least 0"),
        ("fcfs", {"max_wait_seconds": 0}, "max_wait_seconds: 0 must be above 0"),
        ("odbs", {"most_requests": 2.5}, "most_requests: 2.5 is not a whole number"),
        ("odbs", {"most_requests": "many"}, "most_requests: 'many' is not a whole number"),
        ("cslo-odbs", {"caution": "nan"}, "caution: 'nan' is not a number"),
        ("cslo-odbs", {"caution": True}, "caution: True is not a number"),
        ("past-future", {"magic": 1}, "magic: no such setting; available: caution, knee_factor,"),
    ],
)
def test_a_wrong_setting_is_named_with_its_limit(
    name: str, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        step_policy(name, settings)
    assert message in raised.value.message
    assert raised.value.field == next(iter(settings))


def test_settings_change_what_is_decided() -> None:
    assert step_settings("slo-odbs")["most_requests"][0] == 10
    with pytest.raises(InvalidArgumentError, match="available: cslo-odbs"):
        step_policy("magic", {"watermark": 0})
