"""Threads that work through programs: order, hiring and letting go, forks, rest."""

import importlib
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("numba")

from uellm_worker.engine.native import Kernels, kernels  # noqa: E402
from uellm_worker.engine.team import Program, StepNumbers, Team  # noqa: E402

OPERATIONS, SIZE, LIMIT_SECONDS = 150, 48, 120.0


def loaded() -> Kernels:
    found = kernels(torch.device("cpu"), torch.float32)
    assert found is not None
    return found


@pytest.fixture
def team() -> Iterator[Team]:
    """One of its own: that of all tests may have other members."""
    made = Team(importlib.import_module("uellm_worker.engine.kernels.team"))
    yield made
    made.close()


def chain(rows: int) -> tuple[Program, "torch.Tensor"]:
    """Each operation reads what two pieces of the one before have written.

    Returns:
        The program, and what it works on.
    """
    make, weight = loaded().operations, torch.linspace(0.5, 2.0, SIZE)
    both = torch.zeros(2, (rows + 1) * SIZE)
    operations = []
    for number in range(OPERATIONS):
        begin = number % 2 * SIZE // 2
        source, target = (
            memory[begin : begin + rows * SIZE].view(rows, SIZE)
            for memory in (both[number % 2], both[(number + 1) % 2])
        )
        if number % 3:
            operations.append(make.norm(source, weight, None, target, eps=1e-5))
        else:
            operations.append(make.activate(source, target, SIZE, gelu=True, gated=False))
    return Program(operations), both


def outcome(team: Team, rows: int, members: int) -> "torch.Tensor":
    program, memory = chain(rows)
    memory.copy_(torch.randn(memory.shape, generator=torch.Generator().manual_seed(rows)))
    team.run(program, StepNumbers(rows), members)
    return memory


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_operations_come_one_after_another_whoever_computes_them(team: Team, rows: int) -> None:
    wanted = outcome(team, rows, 1)
    assert torch.isfinite(wanted).all()
    # Also more members than cores, and other numbers of them from run to run.
    for members in (2, 3, 9, 4, 1, 2, 4):
        for _ in range(3):
            assert torch.equal(outcome(team, rows, members), wanted)


def test_operations_without_pieces_are_passed_over(team: Team) -> None:
    for members in (1, 3):
        assert torch.equal(outcome(team, 0, members), outcome(team, 0, 1))
        team.run(Program(()), StepNumbers(4), members)


def test_callers_wait_for_each_other(team: Team) -> None:
    wanted = {rows: outcome(team, rows, 1) for rows in (3, 20)}
    wrong: list[int] = []

    def call(rows: int) -> None:
        wrong.extend(
            rows for _ in range(10) if not torch.equal(outcome(team, rows, 3), wanted[rows])
        )

    threads = [threading.Thread(target=call, args=(rows,)) for rows in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_times_are_those_at_which_operations_begin(team: Team) -> None:
    program, _ = chain(16)
    for members in (1, 3):
        times = torch.zeros(len(program.names) + 1, 2, dtype=torch.int64)
        before = time.monotonic()
        team.run(program, StepNumbers(16), members, times)
        seconds = (times.double() @ torch.tensor([1.0, 1e-9], dtype=torch.float64)).tolist()
        assert sorted(seconds) == seconds
        assert before - 1e-3 <= seconds[0] <= seconds[-1] <= time.monotonic() + 1e-3


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_members_sleep_between_programs(team: Team) -> None:
    outcome(team, 16, 3)
    tasks = {thread.native_id for thread in threading.enumerate() if "kernels-" in thread.name}
    assert len(tasks) >= 2
    deadline = time.monotonic() + LIMIT_SECONDS
    while any(state(task) != "S" for task in tasks):
        assert time.monotonic() < deadline
    outcome(team, 16, 3)  # They wake up again.


def state(task: int | None) -> str:
    """Of a thread, as Linux calls it: S for asleep."""
    text = Path(f"/proc/self/task/{task}/stat").read_text()
    return text.rpartition(")")[2].split()[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_process_has_members_of_its_own(team: Team) -> None:
    wanted = outcome(team, 16, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # There are threads, as there would be.
        pid = os.fork()
    if pid == 0:
        os._exit(0 if torch.equal(outcome(team, 16, 3), wanted) else 1)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert torch.equal(outcome(team, 16, 3), wanted)
