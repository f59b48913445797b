"""Write docs/configuration.md from the settings classes, or check that it is current.

Usage: ``python scripts/configuration.py [--check]``
"""

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from uellm.config import ROLES, ServiceSettings

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
HEAD = """# Configuration

Generated from the settings classes by `make docs`: do not edit.

A service reads its settings from environment variables, then from the TOML file that
`UELLM_CONFIG` names. A common setting `x` is `UELLM_X` for every service; `UELLM_<ROLE>_X` sets it
for the services of one role and wins over the common one. In the file, common settings stand at
the top and those of a role in the table of its name:

    redis_url = "redis://10.0.0.5:6379/0"

    [gateway]
    port = 50051

A variable `UELLM_…` that nothing reads, and a name in the file that is no setting, is an error at
start, naming the closest one that exists.

## Read by the command line

| variable | meaning |
|---|---|
| `UELLM_SERVER` | Gateway that commands speak to, `host:port`, or several with commas. |
| `UELLM_JOIN_TOKEN` | What `uellm join` joins by, in place of `--token`. |
| `UELLM_HOME` | Where logs, state and fetched model files are kept; by default \
`~/.local/state/uellm`. |
| `UELLM_CONFIG` | The TOML file above; services that `uellm up` starts read it too. |

OpenTelemetry's own `OTEL_EXPORTER_OTLP_*` variables apply with `UELLM_OTEL_EXPORTER=otlp`.
"""


def settings_of(role: str) -> type[ServiceSettings]:
    """The settings class of a service."""
    module = importlib.import_module(f"uellm_{role}.settings")
    return next(
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, ServiceSettings) and value.role == role
    )


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    return str(getattr(annotation, "__name__", annotation)).replace("|", "\\|")


def _bounds(field: FieldInfo) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = [
        f"{sign} {getattr(constraint, name):g}"
        for constraint in field.metadata
        for name, sign in signs.items()
        if getattr(constraint, name, None) is not None
    ]
    return f" ({', '.join(found)})" if found else ""


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    return "empty" if field.default == "" else f"`{field.default}`"


def _table(prefix: str, fields: dict[str, FieldInfo]) -> list[str]:
    lines = ["| variable | values | default | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        if not field.description:
            raise SystemExit(f"{prefix}{name.upper()} has no description")
        lines.append(
            f"| `{prefix}{name.upper()}` | {_type(field.annotation)}{_bounds(field)} "
            f"| {_default(field)} | {field.description.replace('|', chr(92) + '|')} |"
        )
    return lines


def page() -> str:
    """The whole page."""
    common = ServiceSettings.model_fields
    lines = [HEAD, "## Every service", "", *_table("UELLM_", common)]
    for role in ROLES:
        own = {
            name: field
            for name, field in settings_of(role).model_fields.items()
            if name not in common
        }
        lines += ["", f"## {role.capitalize()}", ""]
        lines += _table(f"UELLM_{role.upper()}_", own) if own else ["Nothing of its own."]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the page, or with ``--check`` compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the page is stale")
    arguments = parser.parse_args()
    fresh = page()
    current = PAGE.read_text() if PAGE.exists() else ""
    if arguments.check:
        if fresh != current:
            print("stale: docs/configuration.md: run `make docs`")
        return int(fresh != current)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
