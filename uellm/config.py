"""Settings: from the command line, the environment, then a TOML file, in this order.

A common setting ``x`` is read from ``UELLM_X``; a service's own ``y`` from ``UELLM_<ROLE>_Y``,
which also overrides a common one for that service alone. In the file named by ``UELLM_CONFIG``
common settings stand at the top and a service's own in the table of its name. A name that nothing
reads is an error, not a silence.
"""

import difflib
import os
import socket
import tomllib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from uellm.addresses import bare, is_anywhere
from uellm.core.errors import ConfigurationError

ROLES = ("gateway", "profiler", "scheduler", "deployer", "worker")
# Read by the command line, not by a service.
CLIENT_VARIABLES = {"CONFIG", "HOME", "JOIN_TOKEN", "SERVER"}


class ServiceSettings(BaseSettings):
    """What every service is told. Frozen; read once, in ``__main__``."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    role: ClassVar[str] = ""

    redis_url: str = Field("redis://localhost:6379/0", description="The mesh's Redis.")
    host: str = Field("0.0.0.0", description="Address that the gRPC server binds to.")
    port: int = Field(0, ge=0, le=65535, description="Port of the gRPC server; 0: any free one.")
    advertise_host: str = Field(
        "", description="Host name or address that others reach this service by; empty: found out."
    )
    service_id: str = Field(
        "", description="Unique name of this service among its role; empty: role, host, process."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe log lines that are written."
    )
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="auto: console on a terminal, JSON lines elsewhere."
    )
    otel_exporter: Literal["none", "console", "otlp"] = Field(
        "none",
        description="Where spans go; otlp reads OpenTelemetry's OTEL_EXPORTER_OTLP_* variables.",
    )
    otel_file: str = Field(
        "",
        description="With the console exporter: a file that spans are appended to as JSON lines.",
    )
    drain_seconds: float = Field(
        20.0, ge=0, description="Longest time that running work is given after SIGTERM."
    )
    lease_seconds: float = Field(
        5.0, gt=0, description="After this silence a service, an owner or a holder counts as gone."
    )
    retention_seconds: int = Field(
        3600,
        gt=0,
        description="So long after its end a request's result is kept, and its idempotency key.",
    )
    decisions_kept: int = Field(
        4096,
        ge=0,
        description="Recorded decisions are kept in about so many entries per model, for `uellm "
        "why`. Under load its scheduler writes four a second, each replica's worker one, of about "
        "10 KB; 0: nothing is recorded.",
    )

    @classmethod
    def load(cls, **overrides: Any) -> Self:
        """Read the settings of a service; ``overrides`` that are None are left out.

        Raises:
            ConfigurationError: naming each wrong setting, where it was set and what is allowed.
        """
        check_environment(cls)
        try:
            return cls(**{name: value for name, value in overrides.items() if value is not None})
        except ValidationError as error:
            lines = [
                f"{'.'.join(map(str, problem['loc']))} = {problem['input']!r}: {problem['msg']}"
                for problem in error.errors()
            ]
            raise ConfigurationError(
                f"settings of {cls.role}: " + "; ".join(lines) + " (docs/configuration.md)",
                field=".".join(map(str, error.errors()[0]["loc"])),
            ) from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Own prefix over common prefix over file."""
        del env_settings, dotenv_settings, file_secret_settings
        own = EnvSettingsSource(settings_cls, env_prefix=f"UELLM_{cls.role.upper()}_")
        common = EnvSettingsSource(ServiceSettings, env_prefix="UELLM_")
        shared = InitSettingsSource(settings_cls, common())
        return (init_settings, own, shared, InitSettingsSource(settings_cls, _read_file(cls)))

    @property
    def advertised_host(self) -> str:
        """The host that others reach this service by."""
        if self.advertise_host:
            return bare(self.advertise_host)
        if not is_anywhere(self.host):
            return bare(self.host)
        return socket.gethostname()

    @property
    def identity(self) -> str:
        """The name of this service among its role."""
        return self.service_id or f"{self.role}-{socket.gethostname()}-{os.getpid()}"


def check_environment(settings: type[ServiceSettings]) -> None:
    """Refuse variables that nothing reads.

    Args:
        settings: those of the service that is to start.

    Raises:
        ConfigurationError: naming the variable and the closest one that exists.
    """
    role = settings.role
    common = {name.upper() for name in ServiceSettings.model_fields} | CLIENT_VARIABLES
    own = {f"{role.upper()}_{name.upper()}" for name in settings.model_fields}
    others = tuple(f"{other.upper()}_" for other in ROLES if other != role)
    # Of others' settings only the common ones are known here: enough to recognise their prefix.
    theirs = {f"{other}{name}" for other in others for name in common - CLIENT_VARIABLES}
    for variable in sorted(os.environ):
        name = variable.removeprefix("UELLM_")
        if name == variable or name in common or name in own or name.startswith(others):
            continue
        hint = _hint(name, common | own | theirs, prefix="UELLM_")
        raise ConfigurationError(
            f"{variable}: no such setting{hint} (docs/configuration.md)", field=variable
        )


def _hint(name: str, known: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _read_file(settings: type[ServiceSettings]) -> dict[str, Any]:
    role = settings.role
    name = os.environ.get("UELLM_CONFIG", "")
    if not name:
        return {}
    try:
        content = tomllib.loads(Path(name).read_text())
    except OSError as error:
        raise ConfigurationError(f"UELLM_CONFIG: {error}", field="UELLM_CONFIG") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"UELLM_CONFIG: {name}: {error}", field="UELLM_CONFIG") from None
    common = {key: value for key, value in content.items() if key not in ROLES}
    _check_names(name, common, {*ServiceSettings.model_fields, *ROLES})
    own: Any = content.get(role, {})
    if not isinstance(own, dict):
        raise ConfigurationError(
            f"{name}: {role} = {own!r}: a table of settings, [{role}]", field=role
        )
    _check_names(f"{name}: [{role}]", own, settings.model_fields)
    return common | own


def _check_names(place: str, given: Iterable[str], known: Collection[str]) -> None:
    for setting in sorted(given):
        if setting not in known:
            hint = _hint(setting, known)
            raise ConfigurationError(
                f"{place}: {setting}: no such setting{hint} (docs/configuration.md)", field=setting
            )
