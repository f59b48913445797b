"""Fits in processes of their own."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from uellm_profiler.fits import fitted

from tests.support.predictors import Endless, Fit, fail, median
from tests.support.waiting import eventually


def loud(lengths: Sequence[float]) -> float:
    print("as libraries do")  # noqa: T201
    return median(lengths)


async def test_what_is_made_comes_back_and_nothing_that_is_printed() -> None:
    made = await fitted(Fit(loud, [3.0, 5.0, 9.0]))
    assert {name: float(value) for name, value in made.items()} == {"value": 5.0, "at": 3.0}


async def test_why_a_fit_failed_is_said() -> None:
    with pytest.raises(RuntimeError, match="status 1: ArithmeticError: no fit to 2 lengths"):
        await fitted(Fit(fail, [1.0, 2.0]))


async def test_a_fit_that_is_given_up_leaves_no_process(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    task = asyncio.create_task(fitted(Endless(str(pid))))
    await eventually(lambda: pid.exists() and pid.read_text())
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert not psutil.pid_exists(int(pid.read_text()))
