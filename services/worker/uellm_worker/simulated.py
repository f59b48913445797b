"""Simulated devices, as settings name them: ``sim:0:memory=4GiB:flops=1e12:bandwidth=1e11``."""

import re
from dataclasses import dataclass

from uellm.core.errors import ConfigurationError

SYNTAX = "sim:<index>:memory=<size>[:flops=<FLOP/s>][:bandwidth=<bytes/s>][:paced]"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True, slots=True)
class Simulated:
    """A device that the CPU plays.

    Attributes:
        name: ``sim:<index>``.
        memory_bytes: what it has.
        flops_per_second: told to planners; 0: not known.
        memory_bytes_per_second: told to planners; 0: not known.
        paced: steps take as long as these say, where the CPU would be faster.
    """

    name: str
    memory_bytes: int
    flops_per_second: float = 0.0
    memory_bytes_per_second: float = 0.0
    paced: bool = False


def parse_simulated(text: str) -> list[Simulated]:
    """The devices of one entry; several equal ones as ``sim:0-3:memory=…``.

    Raises:
        ConfigurationError: saying what is wrong with it.
    """
    kind, *rest = text.split(":")
    first, _, last = (rest[0] if rest else "").partition("-")
    if kind != "sim" or not first.isdecimal() or not (last or first).isdecimal():
        raise _wrong(text, f"it is written {SYNTAX}")
    facts: dict[str, str] = {}
    for part in rest[1:]:
        key, _, value = part.partition("=")
        known = part == "paced" or (value and key in ("memory", "flops", "bandwidth"))
        if not known or key in facts:
            raise _wrong(text, f"{part!r} is none of its properties; it is written {SYNTAX}")
        facts[key] = value
    if "memory" not in facts:
        raise _wrong(text, "it has no memory; add for instance :memory=4GiB")
    paced = "paced" in facts
    if paced and not facts.keys() & {"flops", "bandwidth"}:
        raise _wrong(text, "paced by what? Add :flops=… or :bandwidth=…")
    indices = range(int(first), int(last or first) + 1)
    if not indices:
        raise _wrong(text, f"{first}-{last} is no range; the smaller index comes first")
    return [
        Simulated(
            name=f"sim:{index}",
            memory_bytes=quantity(text, "memory", facts["memory"]),
            flops_per_second=_rate(text, "flops", facts.get("flops")),
            memory_bytes_per_second=_rate(text, "bandwidth", facts.get("bandwidth")),
            paced=paced,
        )
        for index in indices
    ]


def _rate(text: str, key: str, value: str | None) -> float:
    return 0.0 if value is None else _number(text, key, value)


def quantity(text: str, key: str, value: str) -> int:
    """Bytes, plain or with a unit: 4GiB, 500MB.

    Args:
        text: that it stands in, for errors.
        key: likewise.
        value: to be read.

    Raises:
        ConfigurationError: if it is none.
    """
    return int(_number(text, key, value))


def _number(text: str, key: str, value: str) -> float:
    """A positive number, plain or with a unit: 4GiB, 500MB, 1e11."""
    match = _SIZE.fullmatch(value.strip())
    try:
        if match is None:
            number = float(value)
        else:
            prefix = (match[2] or "").upper()
            base = 1024 if prefix.endswith("I") else 1000
            number = float(match[1]) * base ** _POWERS[prefix[:1]]
    except ValueError:
        number = 0.0
    if not 1 <= number < float("inf"):
        raise _wrong(text, f"{key}={value}: a positive number such as 4GiB or 1e11")
    return number


def _wrong(text: str, why: str) -> ConfigurationError:
    return ConfigurationError(f"UELLM_WORKER_DEVICES: {text!r}: {why}", field="devices")
