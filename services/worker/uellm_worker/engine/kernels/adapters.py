"""What LoRA adapters add to products, compiled by Numba: a row by the adapter of its sequence.

What a row gets does not depend on the rows beside it, nor on their adapters.
"""

from numba import cfunc, njit, types

from uellm_worker.engine.kernels.arithmetic import FAST, floats, integers, real
from uellm_worker.engine.tiles import ADAPTERS


@njit(fastmath=FAST, error_model="numpy")
def _product(first, second, size):
    total = types.float32(0.0)
    for i in range(size):
        total += first[i] * second[i]
    return total


@njit(error_model="numpy")
def _add(target, others, factor, size):
    for i in range(size):
        target[i] += factor * others[i]


@cfunc(types.void(*[types.int64] * 4), cache=True)
def adapt(block, step, piece, member):
    """Add to a row what its adapter makes of it; a piece is a row."""
    words, counts = integers(block), integers(step)
    row, output = words[0] + piece * words[1], words[2] + piece * words[3]
    inputs, factor = words[5], real(words[8])
    adapter = integers(counts[ADAPTERS])[piece]
    if adapter < 0 or adapter >= words[9] or integers(words[4])[adapter] == 0:
        return
    found = integers(integers(words[4])[adapter])
    first, ranks, parts = found[0], found[1], found[2]
    inner = floats(words[6] + member * words[7])
    for rank in range(ranks):
        inner[rank] = _product(floats(row), floats(first + 4 * rank * inputs), inputs) * factor
    for part in range(parts):
        at = 3 + 5 * part
        rank, more, column, columns, second = (
            found[at],
            found[at + 1],
            found[at + 2],
            found[at + 3],
            found[at + 4],
        )
        for index in range(more):
            line = floats(second + 4 * index * columns)
            _add(floats(output + 4 * column), line, inner[rank + index], columns)
