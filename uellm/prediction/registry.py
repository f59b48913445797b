"""Predictors by name: the prior, and those that installed packages offer.

A package offers one by an entry point in group ``uellm.predictors``: something that makes a
``Predictor`` of a mapping from names to values, its settings. The entry point's name is the
predictor's. ``uellm_profiler`` offers its own in this way.
"""

from collections.abc import Mapping
from importlib.metadata import entry_points

from uellm.core.errors import InvalidArgumentError
from uellm.prediction.interface import Predictor
from uellm.prediction.prior import Prior, PriorSettings

GROUP = "uellm.predictors"


def predictors() -> list[str]:
    """Names that ``predictor`` takes."""
    return sorted({Prior.name, *entry_points(group=GROUP).names})


def predictor(name: str, settings: Mapping[str, object] | None = None) -> Predictor:
    """A predictor that has learnt nothing yet.

    Args:
        name: its name.
        settings: its own, by name.

    Raises:
        InvalidArgumentError: if there is none of that name, what it needs is not installed, or a
            setting is not what it should be.
    """
    if name == Prior.name:
        return Prior(PriorSettings.parse(settings or {}))
    for entry_point in entry_points(group=GROUP, name=name):
        try:
            make = entry_point.load()
        except ModuleNotFoundError as error:
            raise InvalidArgumentError(
                f"predictor: {name!r} needs {error.name}, which is not installed; "
                f"pip install 'uellm[profiler-llm]' brings what uellm's own need",
                field="predictor",
            ) from error
        made: Predictor = make(settings or {})
        return made
    raise InvalidArgumentError(
        f"predictor: no {name!r}; available: {', '.join(predictors())}", field="predictor"
    )
