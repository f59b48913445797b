"""Durations in words."""


def show_duration(seconds: float) -> str:
    """Seconds in the unit that reads best."""
    if abs(seconds) < 0.01:
        return f"{round(seconds * 1000, 2):.2g} ms"
    if abs(seconds) < 1:
        return f"{seconds * 1000:.0f} ms"
    if abs(seconds) < 120:
        return f"{seconds:.1f} s"
    if abs(seconds) < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
