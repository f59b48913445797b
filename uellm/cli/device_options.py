"""Devices as options name them: pins and costs."""

import re
from collections.abc import Iterable
from math import inf, nan

from uellm.core.errors import InvalidArgumentError
from uellm.placement.views import LayerPin, Pin

_LAYERS = re.compile(r"(?P<first>\d{1,6})-(?P<last>\d{1,6})")


def read_pins(texts: Iterable[str]) -> tuple[tuple[Pin, ...], tuple[LayerPin, ...]]:
    """``DEVICE``, ``first=DEVICE`` and ``last=DEVICE``; and ``0-11=NAME``, layers of a name.

    Raises:
        InvalidArgumentError: naming what is none of these.
    """
    pins: list[Pin] = []
    layer_pins: list[LayerPin] = []
    for text in texts:
        end, found, name = text.partition("=")
        layers = _LAYERS.fullmatch(end)
        if not found:
            pins.append(Pin(text))
        elif end == "first":
            pins.append(Pin(name, "first"))
        elif end == "last":
            pins.append(Pin(name, "last"))
        elif layers is not None and name:
            layer_pins.append(LayerPin(name, int(layers["first"]), int(layers["last"])))
        else:
            raise InvalidArgumentError(
                f"pin: {text!r} is not DEVICE, first=DEVICE, last=DEVICE, or 0-11=NAME for layers "
                "on a device, worker or host",
                field="pin",
            )
    return tuple(pins), tuple(layer_pins)


def read_cost(text: str) -> tuple[str, float]:
    """``DEVICE=COST``."""
    device, found, value = text.rpartition("=")
    try:
        cost = float(value if found and device else "")
    except ValueError:
        cost = nan
    if not 0 <= cost < inf:
        raise InvalidArgumentError(
            f"cost: {text!r} is not DEVICE=NUMBER, of a number from 0 on", field="cost"
        )
    return device, cost
