"""Products of rows with a weight in panels, compiled by Numba; the weight in float32 or float16.

A panel has some rows of the weight, turned: ``[in, PANEL_ROWS]``. What a few rows times its lines
give is summed in registers (Goto and van de Geijn, "Anatomy of high-performance matrix
multiplication", ACM TOMS 34(3), 2008, whose inner kernel this is).
"""

from functools import partial

from numba import cfunc, njit, types
from numba.extending import intrinsic

from uellm_worker.engine.kernels.arithmetic import floats, integers, real
from uellm_worker.engine.kernels.vectors import (
    FLOAT,
    HALVES,
    I64,
    LANES,
    VECTOR,
    VECTORS,
    ZEROS,
    Code,
)
from uellm_worker.engine.tiles import OUTPUT, PANEL_ROWS

LINE = PANEL_ROWS // LANES
"""Vectors of a panel's line."""
PARTS, TILE = (LINE, 8) if VECTORS > 16 else (1, 6)
"""Vectors of a line, and most rows, at a time: sums take half of the registers, with AVX2 more."""
DEPTH = 256
"""Lines of a panel that stay in the first-level cache while rows take turns."""
_AHEAD_BYTES = 2048


def _write_tile(code, arguments, rows, half):
    """Multiply some rows with some lines of a panel; see ``_tile``."""
    given, lines, added, output, stride, added_stride, output_stride, count, factor = arguments
    kind, size = (HALVES, 2 * LANES) if half else (VECTOR, 4 * LANES)
    starts = [code.moved(given, stride, row) for row in range(rows)]

    def one_line(index, sums):
        line = code.moved(lines, I64(LINE * size), index)
        code.read_ahead(line, _AHEAD_BYTES, PARTS * size)
        weights = [code.load(line, size * part, kind) for part in range(PARTS)]
        results = []
        for row, start in enumerate(starts):
            number = code.everywhere(code.load(code.moved(start, I64(4), index), 0, FLOAT))
            before = sums[PARTS * row : PARTS * (row + 1)]
            results += [code.fma(number, w, b) for w, b in zip(weights, before, strict=True)]
        return results

    sums = code.repeat(count, [ZEROS] * (PARTS * rows), one_line)
    scale = code.everywhere(factor)
    for number, total in enumerate(sums):
        row, offset = number // PARTS, 4 * LANES * (number % PARTS)
        addend = code.load(code.moved(added, added_stride, row), offset)
        code.store(code.fma(total, scale, addend), code.moved(output, output_stride, row), offset)


@intrinsic
def _tile(
    typing, case, rows, lines, added, output, stride, added_stride, out_stride, count, factor
):
    """Multiply some rows with some lines of a panel.

    Args:
        typing: Numba's.
        case: how many rows, and ``TILE`` more where the lines are in float16.
        rows: their address.
        lines: their address.
        added: the address of what is added to the sums.
        output: the address of what comes of it.
        stride: bytes from one row to the next.
        added_stride: the same of ``added``.
        out_stride: the same of ``output``.
        count: how many lines.
        factor: of the sums.
    """

    def codegen(context, builder, signature, arguments):
        case, *others = arguments
        code = Code(builder)
        cases = {
            rows + TILE * half: partial(_write_tile, code, others, rows, half)
            for half in (False, True)
            for rows in range(1, TILE + 1)
        }
        code.choose(case, cases)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9, types.float32), codegen


@njit(error_model="numpy")
def _panel(rows, stride, count, depth, panel, half, bias, output, output_stride, factor):
    """Rows times one panel."""
    size = 2 if half else 4
    blocks = (count + TILE - 1) // TILE
    for begin in range(0, depth, DEPTH):
        for turn in range(blocks * (LINE // PARTS)):
            block, column = turn % blocks, turn // blocks * PARTS * LANES
            first = count * block // blocks
            target = output + first * output_stride + 4 * column
            # What has been summed before is added, or else the bias.
            added, added_stride = target, output_stride
            if begin == 0:
                added, added_stride = bias + 4 * column, types.int64(0)
            _tile(
                count * (block + 1) // blocks - first + half * TILE,
                rows + first * stride + 4 * begin,
                panel + (begin * PANEL_ROWS + column) * size,
                added,
                target,
                stride,
                added_stride,
                output_stride,
                min(DEPTH, depth - begin),
                factor,
            )


@njit(error_model="numpy")
def add_rows(output, output_stride, added, added_stride, count):
    """Add some rows of other numbers to what a panel gave."""
    for row in range(count):
        target, others = floats(output + row * output_stride), floats(added + row * added_stride)
        for i in range(PANEL_ROWS):
            target[i] += others[i]


@cfunc(types.void(*[types.int64] * 4), cache=True)
def multiply(block, step, piece, member):
    """Rows times a weight, and a bias and other rows added; a piece is a panel."""
    words, counts = integers(block), integers(step)
    rows, stride, panels, half, bias = words[0], words[1], words[2], words[3], words[4]
    output, output_stride, depth, count = words[5], words[6], words[7], counts[words[8]]
    factor, added, added_stride = real(words[9]), words[10], words[11]
    if output == 0:
        output = counts[OUTPUT]
    panel = panels + piece * depth * PANEL_ROWS * (2 if half else 4)
    column = 4 * piece * PANEL_ROWS
    bias, output = bias + column, output + column
    _panel(rows, stride, count, depth, panel, half, bias, output, output_stride, factor)
    if added:
        add_rows(output, output_stride, added + column, added_stride, count)
