"""Settings: where they come from, and what a wrong one is told."""

from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field, ValidationError

from uellm.config import ServiceSettings, check_environment
from uellm.core.errors import ConfigurationError


class ProfilerLike(ServiceSettings):
    """Settings of a service that stands in for the profiler."""

    role: ClassVar[str] = "profiler"

    budget_seconds: float = Field(0.5, gt=0, description="A setting of its own.")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    import os  # noqa: PLC0415

    for name in [name for name in os.environ if name.startswith("UELLM_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "uellm.toml"
    monkeypatch.setenv("UELLM_CONFIG", str(path))
    return path


def test_defaults_need_nothing() -> None:
    settings = ProfilerLike.load()
    assert settings.redis_url == "redis://localhost:6379/0"
    assert settings.budget_seconds == 0.5
    assert settings.identity.startswith("profiler-")


def test_sources_go_before_each_other(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_file.write_text(
        'port = 1\nlog_level = "error"\n[profiler]\nport = 2\n[gateway]\nport = 9\n'
    )
    assert ProfilerLike.load().port == 2
    assert ProfilerLike.load().log_level == "error"
    monkeypatch.setenv("UELLM_PORT", "3")
    assert ProfilerLike.load().port == 3
    monkeypatch.setenv("UELLM_PROFILER_PORT", "4")
    assert ProfilerLike.load().port == 4
    assert ProfilerLike.load(port=5, log_level=None).port == 5


def test_a_services_own_settings_are_read_from_both(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_file.write_text("[profiler]\nbudget_seconds = 2\n")
    assert ProfilerLike.load().budget_seconds == 2
    monkeypatch.setenv("UELLM_PROFILER_BUDGET_SECONDS", "3")
    assert ProfilerLike.load().budget_seconds == 3


def test_other_services_settings_are_let_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UELLM_WORKER_ANYTHING", "1")
    monkeypatch.setenv("UELLM_SERVER", "localhost:1")
    monkeypatch.setenv("OTHER", "1")
    assert ProfilerLike.load().budget_seconds == 0.5


@pytest.mark.parametrize(
    ("variable", "hint"),
    [
        ("UELLM_REDIS", "UELLM_REDIS_URL"),
        ("UELLM_GATWAY_PORT", "UELLM_GATEWAY_PORT"),
        ("UELLM_LOGLEVEL", "UELLM_LOG_LEVEL"),
        ("UELLM_PROFILER_BUDGET", "UELLM_PROFILER_BUDGET_SECONDS"),
        ("UELLM_PROFILER_BUGDET_SECONDS", "UELLM_PROFILER_BUDGET_SECONDS"),
        ("UELLM_BUDGET_SECONDS", "UELLM_PROFILER_BUDGET_SECONDS"),
    ],
)
def test_an_unknown_variable_is_named_with_the_closest(
    monkeypatch: pytest.MonkeyPatch, variable: str, hint: str
) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ConfigurationError) as error:
        ProfilerLike.load()
    assert error.value.field == variable
    assert variable in error.value.message
    assert f"did you mean {hint}?" in error.value.message


def test_a_variable_like_nothing_has_no_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UELLM_QQQQQQ", "1")
    with pytest.raises(ConfigurationError) as error:
        check_environment(ProfilerLike)
    assert "did you mean" not in error.value.message


@pytest.mark.parametrize(
    ("variable", "value", "field"),
    [
        ("UELLM_PORT", "many", "port"),
        ("UELLM_PORT", "-1", "port"),
        ("UELLM_PORT", "70000", "port"),
        ("UELLM_PORT", "", "port"),
        ("UELLM_LOG_LEVEL", "loud", "log_level"),
        ("UELLM_PROFILER_BUDGET_SECONDS", "0", "budget_seconds"),
        ("UELLM_LEASE_SECONDS", "-5", "lease_seconds"),
        ("UELLM_PROFILER_BUDGET_SECONDS", "inf", "budget_seconds"),
        ("UELLM_PROFILER_BUDGET_SECONDS", "nan", "budget_seconds"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, field: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError) as error:
        ProfilerLike.load()
    assert error.value.field == field
    assert f"{field} = {value!r}: " in error.value.message
    assert "settings of profiler" in error.value.message


def test_all_wrong_values_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UELLM_PORT", "-1")
    monkeypatch.setenv("UELLM_LOG_LEVEL", "loud")
    with pytest.raises(ConfigurationError, match=r"port.*; log_level|log_level.*; port"):
        ProfilerLike.load()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("prot = 1", "prot.*did you mean port"),
        ("[profiler]\nbugdet_seconds = 1", "bugdet_seconds.*did you mean budget_seconds"),
        ("profiler = 1", "profiler"),
        ("port = ", "uellm.toml"),
        ("port = 'x'", "port"),
        ("[profilr]\nport = 1", "profilr.*did you mean profiler"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(
    config_file: Path, content: str, said: str
) -> None:
    config_file.write_text(content)
    with pytest.raises(ConfigurationError, match=said):
        ProfilerLike.load()


def test_a_missing_file_is_named(config_file: Path) -> None:
    with pytest.raises(ConfigurationError, match=str(config_file)) as error:
        ProfilerLike.load()
    assert error.value.field == "UELLM_CONFIG"


def test_a_file_that_is_no_text_is_named(config_file: Path) -> None:
    config_file.write_bytes(b"\xff\xfe\x00port")
    with pytest.raises(ConfigurationError, match="UELLM_CONFIG"):
        ProfilerLike.load()


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        ProfilerLike.load().port = 1


@pytest.mark.parametrize(
    ("host", "advertise", "expected"),
    [
        *(("127.0.0.1", "", "127.0.0.1"), ("0.0.0.0", "mesh-1", "mesh-1"), ("::1", "x", "x")),
        *(("::1", "", "::1"), ("[::1]", "", "::1"), ("::", "[fd00::1]", "fd00::1")),
    ],
)
def test_the_advertised_host(host: str, advertise: str, expected: str) -> None:
    assert ProfilerLike.load(host=host, advertise_host=advertise).advertised_host == expected


def test_a_host_bound_to_everything_advertises_its_name() -> None:
    assert ProfilerLike.load(host="0.0.0.0").advertised_host not in {"", "0.0.0.0"}
    assert ProfilerLike.load(service_id="p-1").identity == "p-1"
