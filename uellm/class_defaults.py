"""What requests of an urgency class need that say nothing of it themselves, by model."""

from collections.abc import Mapping

from uellm.convert import duration_seconds
from uellm.core.errors import InvalidArgumentError
from uellm.v1 import common_pb2

CLASSES: Mapping[str, "common_pb2.Priority.ValueType"] = {
    "batch": common_pb2.PRIORITY_BATCH,
    "normal": common_pb2.PRIORITY_NORMAL,
    "interactive": common_pb2.PRIORITY_INTERACTIVE,
}
OBJECTIVES = ("deadline", "ttft", "tpot")
MOST_SECONDS = 86_400.0


def check_class_defaults(policy: common_pb2.ModelPolicy) -> None:
    """Check that classes and objectives are what they should be.

    Raises:
        InvalidArgumentError: for the first thing that is wrong.
    """
    for name, slo in policy.class_defaults.items():
        if name not in CLASSES:
            raise _refuse(f"class.{name}", f"no such class; one of {', '.join(CLASSES)}")
        given = {
            objective: duration_seconds(getattr(slo, objective))
            for objective in OBJECTIVES
            if slo.HasField(objective)  # type: ignore[arg-type]
        }
        if not given:
            raise _refuse(f"class.{name}", f"asks for nothing; at least one of {_OBJECTIVES}")
        for objective, seconds in given.items():
            if not 0 < seconds <= MOST_SECONDS:
                raise _refuse(
                    f"class.{name}.{objective}",
                    f"{seconds:g} s must be more than 0 and at most {MOST_SECONDS:g} s (24 hours)",
                )
        if given.get("ttft", 0.0) > given.get("deadline", MOST_SECONDS):
            raise _refuse(
                f"class.{name}.ttft", "later than the deadline; the first token comes before"
            )


def with_defaults(
    slo: common_pb2.Slo, defaults: Mapping[str, common_pb2.Slo] | None
) -> common_pb2.Slo:
    """An SLO; that of its class, where it has no objective of its own.

    Args:
        slo: as it was asked for.
        defaults: of the model, by class.
    """
    if not defaults or any(slo.HasField(name) for name in OBJECTIVES):  # type: ignore[arg-type]
        return slo
    priority = slo.priority or common_pb2.PRIORITY_NORMAL
    for name, default in defaults.items():
        if CLASSES.get(name) == priority:
            completed = common_pb2.Slo()
            completed.CopyFrom(default)
            completed.priority = slo.priority
            return completed
    return slo


_OBJECTIVES = ", ".join(OBJECTIVES)


def _refuse(field: str, problem: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{field}: {problem}", field=field)
