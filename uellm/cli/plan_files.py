"""Plans in files: what ``uellm plan --json`` wrote, or stages as somebody wants them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from uellm.core.errors import InvalidArgumentError
from uellm.placement.views import FullStage, Plan, PlannedReplica, PlannedStage

_MOST_BYTES = 16 << 20
_MOST = 2**31 - 1
"""Of layers, slots and tokens."""
_MOST_WORDS = 200
_UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError),
    yaml.YAMLError,
)


def read_plan(path: Path, option: str) -> Plan:
    """Where a model is or is to be; of stages, device and layers.

    Args:
        path: YAML or JSON, with the ``plan`` that ``uellm plan --json`` writes, or with ``stages``.
        option: that named it.

    Raises:
        InvalidArgumentError: if it is neither.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES} bytes")
        said: Any = yaml.safe_load(path.read_text())
        plan: dict[str, Any] = said.get("plan", {"replicas": [said]})
        return Plan(
            replicas=tuple(PlannedReplica(_stages(each["stages"])) for each in plan["replicas"]),
            slots=_number(plan, "slots", 0),
            max_tokens=_number(plan, "max_tokens", 0),
            objective=str(plan.get("objective", "")),
            explanation="",
            full_stage=FullStage((), 0.0, 0.0) if plan.get("full_stage") else None,
        )
    except _UNREADABLE as error:
        raise InvalidArgumentError(
            f"{option}: {path} is no plan: it has neither what `uellm plan --json` writes nor "
            f"stages, each with device_id, first_layer and last_layer ({_briefly(error)})",
            field=option,
        ) from None


def _briefly(error: Exception) -> str:
    """An error in a line: some repeat all that they were about."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:_MOST_WORDS]}{'…' if len(words) > _MOST_WORDS else ''}"


def _stages(said: Sequence[dict[str, Any]]) -> tuple[PlannedStage, ...]:
    if not said:
        raise ValueError("no stages")
    return tuple(
        PlannedStage(
            device_id=_name(stage["device_id"]),
            first_layer=_number(stage, "first_layer"),
            last_layer=_number(stage, "last_layer"),
            has_embed=index == 0,
            has_head=index == len(said) - 1,
            memory_bytes=int(stage.get("memory_bytes", 0)),
            kv_bytes=int(stage.get("kv_bytes", 0)),
        )
        for index, stage in enumerate(said)
    )


def _name(said: object) -> str:
    if not isinstance(said, str) or not said:
        raise ValueError(f"device_id: {said!r} is no name")
    return said


def _number(said: dict[str, Any], name: str, default: int | None = None) -> int:
    value = int(said[name] if default is None else said.get(name, default))
    if not 0 <= value <= _MOST:
        raise ValueError(f"{name}: {value}; from 0 to {_MOST}")
    return value
