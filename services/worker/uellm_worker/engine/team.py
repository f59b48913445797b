"""Threads that work through programs of kernels, and what a program is; see ``kernels/team.py``.

The first member is whoever runs a program; the others are threads that sleep between programs.
"""

import ctypes
import os
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from uellm_worker.engine.tiles import (
    MEMBERS,
    OPERATION_WORDS,
    PROGRAM,
    ROW_PIECE,
    STATE_WORDS,
    STEP,
    TIMES,
    TURNS,
)


@dataclass(frozen=True, slots=True)
class Operation:
    """What a kernel is to do, in pieces that can be computed in any order.

    Attributes:
        kernel: address of its code.
        pieces: for each of what the step has.
        per: of what; one of the counts in ``tiles.py``.
        block: what the kernel is told: addresses, numbers, flags.
        name: of the kind of work, for those who time it.
        tensors: whose addresses the block has.
    """

    kernel: int
    pieces: int
    per: int
    block: tuple[float, ...]
    name: str
    tensors: tuple[torch.Tensor | None, ...]


class Program:
    """Operations one after another, as threads read them.

    Args:
        operations: in their order.
    """

    def __init__(self, operations: Sequence[Operation]) -> None:
        self.names = [operation.name for operation in operations]
        self._operations = operations  # And with them their tensors.
        head = OPERATION_WORDS * (len(operations) + 1)
        self._memory = _numbers(head + sum(len(operation.block) for operation in operations))
        self.address = ctypes.addressof(self._memory)
        at = head
        for index, operation in enumerate(operations):
            block = self.address + 8 * at
            place = OPERATION_WORDS * index
            row = (operation.kernel, operation.pieces, operation.per, block)
            self._memory[place : place + OPERATION_WORDS] = row
            struct.pack_into(_layout(operation.block), self._memory, 8 * at, *operation.block)
            at += len(operation.block)


class StepNumbers:
    """What a step is, as kernels read it.

    Args:
        rows: how many.
        slots: ``[rows]``.
        positions: ``[rows]``, in their sequences.
        spans: ``[n, 4]``: first row, rows, slot and first position of rows that attend together.
        samples: rows that sample.
        output: gets the step's output.
        adapters: ``[rows]``, index of each one's adapter, -1 for none; None: no row has one.
        turns: by kind of rotation, ``[positions, pairs]`` complex.
    """

    def __init__(
        self,
        rows: int,
        slots: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        spans: torch.Tensor | None = None,
        samples: torch.Tensor | None = None,
        output: torch.Tensor | None = None,
        adapters: torch.Tensor | None = None,
        turns: Sequence[torch.Tensor] = (),
    ) -> None:
        self._tensors = (slots, positions, spans, samples, output, adapters, *turns)
        sampling = 0 if samples is None else len(samples)
        self._memory = _numbers(TURNS + len(turns))
        self._memory[:] = (
            1,
            rows,
            -(-rows // ROW_PIECE),
            0 if spans is None else len(spans),
            sampling,
            -(-sampling // ROW_PIECE),
            sampling > 0,
            0 if adapters is None else rows,
            *(0 if each is None else each.data_ptr() for each in self._tensors),
        )
        self.address = ctypes.addressof(self._memory)


def _numbers(count: int) -> Any:
    """Room for so many numbers of 8 bytes."""
    return (ctypes.c_int64 * count)()


def _layout(block: Sequence[float]) -> str:
    return "@" + "".join("d" if isinstance(value, float) else "q" for value in block)


class Team:
    """Threads of this process that run programs.

    Args:
        module: ``kernels/team.py``.
    """

    def __init__(self, module: Any) -> None:
        self._join = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)(module.join.address)
        run = ctypes.CFUNCTYPE(None, ctypes.c_int64)
        self._run, self._run_alone = run(module.run.address), run(module.run_alone.address)
        self._look = run(module.look.address)
        self._lock = threading.Lock()
        self._gather()

    def _gather(self) -> None:
        """Begin with one member; in a forked process the threads of the other are not there."""
        self._process = os.getpid()
        # Aligned, so that what threads wait for has cache lines of its own.
        self._memory = torch.zeros(STATE_WORDS, dtype=torch.int64)
        self._state = (ctypes.c_int64 * STATE_WORDS).from_address(self._memory.data_ptr())
        self._state[MEMBERS] = 1
        self._others: list[threading.Thread] = []

    def run(
        self, program: Program, step: StepNumbers, members: int, times: torch.Tensor | None = None
    ) -> None:
        """Run a program.

        Args:
            program: which.
            step: that it computes.
            members: threads that work at it.
            times: gets seconds and nanoseconds at which each operation began and the last ended,
                ``[operations + 1, 2]``.
        """
        with self._lock:
            if self._process != os.getpid():
                self._gather()
            if members > 1 and members != len(self._others) + 1:
                self._hire(members)
            state = self._state
            state[PROGRAM], state[STEP] = program.address, step.address
            state[TIMES] = 0 if times is None else times.data_ptr()
            run = self._run if members > 1 else self._run_alone
            run(self._memory.data_ptr())

    def close(self) -> None:
        """Let the others go; the next run hires again."""
        with self._lock:
            self._hire(1)

    def _hire(self, members: int) -> None:
        """Have so many members, the caller included."""
        self._state[MEMBERS] = members
        if members <= len(self._others):
            self._look(self._memory.data_ptr())
        for thread in self._others[members - 1 :]:
            thread.join()
        del self._others[members - 1 :]
        for member in range(len(self._others) + 1, members):
            arguments = (self._memory, member)
            name = f"kernels-{member}"
            thread = threading.Thread(target=self._serve, args=arguments, name=name, daemon=True)
            thread.start()
            self._others.append(thread)

    def _serve(self, memory: torch.Tensor, member: int) -> None:
        """What a thread does; the state stays in memory as long."""
        self._join(memory.data_ptr(), member)
