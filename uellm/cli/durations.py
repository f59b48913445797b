"""Durations as people write them."""

import re

import typer

_DURATION = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>ms|s|m|h|)")
_SECONDS = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0}
LONGEST_SECONDS = 7 * 24 * 3600.0


def parse_duration(text: str) -> float:
    """Seconds: ``500ms``, ``5s``, ``2m``, ``1h``, or a bare number of seconds.

    Raises:
        typer.BadParameter: if it is none of these, not positive, or longer than a week.
    """
    match = _DURATION.fullmatch(text.strip().lower())
    if match is None:
        raise typer.BadParameter(f"{text!r} is no duration; for instance 500ms, 5s or 2m")
    seconds = float(match["number"]) * _SECONDS[match["unit"]]
    if not 0 < seconds <= LONGEST_SECONDS:
        raise typer.BadParameter(f"{text!r}: more than 0 and at most 168h")
    return seconds


def parse_limit(text: str) -> float:
    """Seconds, as ``parse_duration``; 0: none.

    Raises:
        typer.BadParameter: if it is no duration.
    """
    return 0.0 if re.fullmatch(r"0(?:\.0*)?", text.strip()) else parse_duration(text)


def ago(seconds: float) -> str:
    """How long ago something was."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"
