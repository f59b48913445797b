"""Command lines of the benchmarks: help that says what the module does, values that are checked."""

from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

from uellm.core.errors import UellmError

T = TypeVar("T")


def parser_of(name: str, description: str | None) -> ArgumentParser:
    """A parser for ``python -m benchmarks.NAME``.

    Args:
        name: of the module.
        description: its docstring.
    """
    return ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=RawDescriptionHelpFormatter,
    )


def count(text: str) -> int:
    """A whole number from 1 on.

    Raises:
        ArgumentTypeError: if it is none.
    """
    return _at_least(1, text)


def count_or_none(text: str) -> int:
    """A whole number from 0 on.

    Raises:
        ArgumentTypeError: if it is none.
    """
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise ArgumentTypeError(f"{text!r}: a whole number from {least} on is needed")
    return int(text)


def positive(text: str) -> float:
    """A number above 0.

    Raises:
        ArgumentTypeError: if it is none.
    """
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ArgumentTypeError(f"{text!r}: a number above 0 is needed")
    return number


def directory(text: str) -> Path:
    """A directory that there is.

    Raises:
        ArgumentTypeError: if there is none.
    """
    if not Path(text).is_dir():
        raise ArgumentTypeError(f"{text}: no such directory")
    return Path(text)


def one_of(names: Collection[str]) -> Callable[[str], str]:
    """Takes one of these names."""

    def check(text: str) -> str:
        if text not in names:
            raise ArgumentTypeError(f"{text!r}: there are {', '.join(names)}")
        return text

    return check


def known_to(find: Callable[[str], object]) -> Callable[[str], str]:
    """Takes names that something is found by."""

    def check(text: str) -> str:
        try:
            find(text)
        except UellmError as error:
            raise ArgumentTypeError(str(error)) from None
        return text

    return check


def several(each: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Takes values with commas between them."""
    return lambda text: [each(value.strip()) for value in text.split(",")]
