"""How threads work through a program together, compiled by Numba; ``team.py`` says what both are.

A program is a list of operations, each of some pieces, which any threads may compute in any order.
An operation begins when all pieces of the one before are done. Nobody waits for threads: one that
the system keeps from running holds up the piece that it has, and is missed no more than that.

The ticket says in one number which operation is under way, and how many of its pieces nobody has
taken yet. Pieces are taken by exchanging it for the next; whoever computed the last piece of an
operation puts up the ticket of the next one. Every run begins with another number in front, so that
a thread that slept through runs takes nothing by an old ticket. Threads sleep by the
low half of the ticket, which changes with every operation.
"""

import platform

from llvmlite import ir
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from uellm_worker.engine.kernels.arithmetic import integers
from uellm_worker.engine.kernels.vectors import I32, I64
from uellm_worker.engine.tiles import (
    DONE,
    MEMBERS,
    OPERATION_WORDS,
    PIECE_BITS,
    PROGRAM,
    RUN_SHIFT,
    SLEEPERS,
    STEP,
    TICKET,
    TIMES,
)

_SPINS = 1500
"""Looks at the ticket before a thread sleeps: some ten microseconds, what pieces take."""
_PIECES = (1 << PIECE_BITS) - 1
_OPERATIONS = (1 << (RUN_SHIFT - PIECE_BITS)) - 1
_OVER = _OPERATIONS
"""The operation of a ticket when a program is over."""
_FUTEX = {"x86_64": 202, "aarch64": 98}[platform.machine()]
"""Number of Linux's system call."""
_PAUSE = {"x86_64": ("llvm.x86.sse2.pause", ()), "aarch64": ("llvm.aarch64.hint", (I32(1),))}[
    platform.machine()
]
"""LLVM's function that lets a core do less for a moment, and what it is given."""
_WAIT, _WAKE = 128, 129
"""FUTEX_WAIT and FUTEX_WAKE within a process."""
_ALL = 2**31 - 1
_MONOTONIC = 1
_clock = types.ExternalFunction("clock_gettime", types.int64(types.int64, types.int64))
_system_call = types.ExternalFunction("syscall", types.int64(*[types.int64] * 5))


def _place(builder, address):
    return builder.inttoptr(address, I64.as_pointer())


@intrinsic
def _load(typing, address):
    """The number at an address, as other threads have left it."""

    def codegen(context, builder, signature, arguments):
        return builder.load_atomic(_place(builder, arguments[0]), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _store(typing, address, value):
    """Put a number there, for other threads to find after all that was written before."""

    def codegen(context, builder, signature, arguments):
        address, value = arguments
        builder.store_atomic(value, _place(builder, address), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _add(typing, address, value):
    """Add to the number at an address; what it was before."""

    def codegen(context, builder, signature, arguments):
        address, value = arguments
        return builder.atomic_rmw("add", _place(builder, address), value, "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _exchange(typing, address, before, after):
    """Put a number in the place of another; False if that is not there."""

    def codegen(context, builder, signature, arguments):
        address, before, after = arguments
        place = _place(builder, address)
        result = builder.cmpxchg(place, before, after, "seq_cst", "seq_cst")
        return builder.extract_value(result, 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def _pause(typing):
    """Let the core do less for a moment."""

    def codegen(context, builder, signature, arguments):
        name, given = _PAUSE
        kind = ir.FunctionType(ir.VoidType(), [each.type for each in given])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, name), given)
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _call(typing, kernel, block, step, piece, member):
    """Have a kernel compute a piece."""

    def codegen(context, builder, signature, arguments):
        kernel, *others = arguments
        kind = ir.FunctionType(ir.VoidType(), [I64] * 4)
        builder.call(builder.inttoptr(kernel, kind.as_pointer()), others)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@njit(error_model="numpy")
def _pieces(program, step, operation):
    """Pieces of an operation: so many for each of what the step counts; -1 behind the last."""
    words = integers(program + 8 * OPERATION_WORDS * operation)
    if words[0] == 0:
        return types.int64(-1)
    return words[1] * integers(step)[words[2]]


@njit(error_model="numpy")
def _note_time(state, operation):
    """Write down when an operation begins, if that is wanted."""
    times = integers(state)[TIMES]
    if times:
        _clock(types.int64(_MONOTONIC), times + 16 * operation)


@njit(error_model="numpy")
def _put_up(state, ticket, operation):
    """Put up the ticket of the first operation from this one on that has pieces."""
    words = integers(state)
    program, step = words[PROGRAM], words[STEP]
    pieces = _pieces(program, step, operation)
    _note_time(state, operation)
    while pieces == 0:
        operation += 1
        pieces = _pieces(program, step, operation)
        _note_time(state, operation)
    if pieces < 0:
        operation, pieces = types.int64(_OVER), types.int64(0)
    _store(state + 8 * DONE, 0)
    run = (ticket >> RUN_SHIFT) << RUN_SHIFT
    _store(state + 8 * TICKET, run | (operation << PIECE_BITS) | pieces)
    if _load(state + 8 * SLEEPERS) > 0:
        _system_call(_FUTEX, state + 8 * TICKET, _WAKE, _ALL, 0)


@njit(error_model="numpy")
def _compute(state, ticket, member):
    """Compute the piece that a ticket was exchanged for."""
    words = integers(state)
    operation = (ticket >> PIECE_BITS) & _OPERATIONS
    program, step = words[PROGRAM], words[STEP]
    pieces = _pieces(program, step, operation)
    of = integers(program + 8 * OPERATION_WORDS * operation)
    _call(of[0], of[3], step, pieces - (ticket & _PIECES), member)
    if _add(state + 8 * DONE, 1) + 1 == pieces:
        _put_up(state, ticket, operation + 1)


@njit(error_model="numpy")
def _await(state, ticket):
    """Wait until there is another ticket: awake for a moment, then asleep."""
    for _ in range(_SPINS):
        if _load(state + 8 * TICKET) != ticket:
            return
        _pause()
    _add(state + 8 * SLEEPERS, 1)
    if _load(state + 8 * TICKET) == ticket:
        _system_call(_FUTEX, state + 8 * TICKET, _WAIT, ticket & 0xFFFFFFFF, 0)
    _add(state + 8 * SLEEPERS, -1)


@njit(error_model="numpy")
def _work(state, member):
    """Take pieces and compute them: member 0 until the program is over, others until let go."""
    while member < _load(state + 8 * MEMBERS):
        ticket = _load(state + 8 * TICKET)
        if ticket & _PIECES:
            if _exchange(state + 8 * TICKET, ticket, ticket - 1):
                _compute(state, ticket, member)
        elif member == 0 and (ticket >> PIECE_BITS) & _OPERATIONS == _OVER:
            return
        else:
            _await(state, ticket)


@cfunc(types.void(types.int64, types.int64), cache=True)
def join(state, member):
    """Work at all programs that the state will name, as one of its members but the first."""
    _work(state, member)


@cfunc(types.void(types.int64), cache=True)
def run(state):
    """Run the program that the state names, as its first member."""
    _put_up(state, _load(state + 8 * TICKET) + (1 << RUN_SHIFT), types.int64(0))
    _work(state, types.int64(0))


@cfunc(types.void(types.int64), cache=True)
def run_alone(state):
    """Run the program that the state names without the others."""
    words = integers(state)
    program, step = words[PROGRAM], words[STEP]
    operation = types.int64(0)
    while True:
        _note_time(state, operation)
        pieces = _pieces(program, step, operation)
        if pieces < 0:
            return
        of = integers(program + 8 * OPERATION_WORDS * operation)
        for piece in range(pieces):
            _call(of[0], of[3], step, piece, types.int64(0))
        operation += 1


@cfunc(types.void(types.int64), cache=True)
def look(state):
    """Have the others look at the state again, between two programs."""
    _store(state + 8 * TICKET, _load(state + 8 * TICKET) ^ (1 << PIECE_BITS))
    _system_call(_FUTEX, state + 8 * TICKET, _WAKE, _ALL, 0)
