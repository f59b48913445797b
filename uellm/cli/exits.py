"""How a command ends: its exit status, and one line that says why.

0 all is well; 1 it failed; 2 it was asked for wrongly, or cannot be done as configured; 3 no mesh
answers; 130 it was interrupted.
"""

import sys

from uellm.core.errors import (
    ConfigurationError,
    InvalidArgumentError,
    UellmError,
    UnavailableError,
)

OK, FAILED, USAGE, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 130


def status_of(error: UellmError) -> int:
    """The exit status that an error comes to."""
    if isinstance(error, ConfigurationError | InvalidArgumentError):
        return USAGE
    return UNREACHABLE if isinstance(error, UnavailableError) else FAILED


def explain(error: UellmError) -> str:
    """An error in one line: the field unless the message names it, what, and when to retry."""
    field = error.field if error.field and error.field not in error.message else ""
    line = f"{field}: {error.message}" if field else error.message
    if error.retry_after_seconds is not None and not isinstance(error, UnavailableError):
        line += f" (try again in {error.retry_after_seconds:.1f} s)"
    return line


def complain(error: UellmError) -> int:
    """Say why on standard error; returns the exit status."""
    sys.stderr.write(f"uellm: {explain(error)}\n")
    return status_of(error)


def report_fault(error: Exception) -> int:
    """Keep the trace of an error that nobody foresaw, and say where; returns the exit status."""
    import traceback

    from redis.exceptions import RedisError

    from uellm.mesh.state import home

    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        # What was given is no UTF-8: Python hands such bytes on as halves of characters.
        given = error.object.encode(errors="backslashreplace").decode()
        return complain(InvalidArgumentError(f"'{given[:80]}' is no UTF-8; give it in UTF-8"))
    if isinstance(error, RedisError):
        # It answered when the command began, or there would have been another message.
        text = (
            f"the mesh's Redis went away meanwhile ({error}); try again once `uellm health` is well"
        )
        return complain(UnavailableError(text))
    path = home() / "fault.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(traceback.format_exception(error)))
        kept = f"the trace is in {path}"
    except OSError:
        kept = f"and {path} cannot be written; set UELLM_HOME to a directory of yours"
    sys.stderr.write(f"uellm: a fault in uellm itself: {type(error).__name__}: {error}; {kept}\n")
    return FAILED
