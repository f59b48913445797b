"""Products of rows with a quantised weight in panels, compiled by Numba.

A line of a panel has the whole codes of one input, or in 4 bits of two, for ``PANEL_ROWS`` outputs.
They are widened to float32 in registers, as they are needed. What the inputs of a group give is
summed first, and multiplied with the group's scales then: that is the product with
``(codes - zeros) * scales`` but for rounding.
"""

from functools import partial

from llvmlite import ir
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from uellm_worker.engine.kernels.arithmetic import bytes_at, floats, integers, real
from uellm_worker.engine.kernels.panels import DEPTH, LINE, PARTS, TILE, add_rows
from uellm_worker.engine.kernels.vectors import (
    BFLOATS,
    FLOAT,
    HALVES,
    I64,
    LANES,
    VECTOR,
    ZEROS,
    Code,
)
from uellm_worker.engine.tiles import OUTPUT, PANEL_ROWS

_AHEAD_BYTES = 2048
_KINDS = {0: (VECTOR, 4), 1: (HALVES, 2), 2: (BFLOATS, 2)}
"""Of scales: float32, float16, bfloat16; and bytes of each."""


def _widened(code, line, bits, zeros):
    """The codes of a line, less their zeros, as floats: by input, then by part of the panel."""
    found = [code.codes(line, LANES * part) for part in range(PARTS)]
    if bits == 4:
        found = [code.nibbles(codes) for codes in found]
        found = list(zip(*found, strict=True))
    else:
        found = [found]
    numbers = [[code.builder.sitofp(codes, VECTOR) for codes in each] for each in found]
    if zeros is None:
        return numbers
    return [[code.builder.fsub(n, z) for n, z in zip(each, zeros, strict=True)] for each in numbers]


def _write_tile(code, arguments, rows, bits, shifted):
    """Multiply some rows with some lines of a panel; see ``_tile``."""
    given, lines, added, output, stride, added_stride, output_stride, count, numbers = arguments
    starts = [code.moved(given, stride, row) for row in range(rows)]
    inputs = 8 // bits

    def part(index):
        return code.load(numbers, 4 * LANES * index)

    scales = [part(index) for index in range(PARTS)]
    zeros = [part(LINE + index) for index in range(PARTS)] if shifted else None

    def add_lines(places):
        """The sums of some of the inputs of each line, one after another."""

        def one_line(index, sums):
            line = code.moved(lines, I64(PANEL_ROWS), index)
            code.read_ahead(line, _AHEAD_BYTES, PANEL_ROWS)
            widened = _widened(code, line, bits, zeros)
            results = []
            for turn, place in enumerate(places):
                for row, start in enumerate(starts):
                    at = code.moved(start, I64(4 * inputs), index)
                    number = code.everywhere(code.load(at, 4 * place, FLOAT))
                    first = PARTS * (rows * turn + row)
                    before = sums[first : first + PARTS]
                    pairs = zip(widened[place], before, strict=True)
                    results += [code.fma(number, w, b) for w, b in pairs]
            return results

        return code.repeat(count, [ZEROS] * (PARTS * rows * len(places)), one_line)

    if inputs == 1:
        sums = add_lines((0,))
    else:
        # Sums of their own, so that few rows wait less for each other; many take turns instead.
        few = 2 * rows <= TILE
        both = add_lines((0, 1)) if few else [*add_lines((0,)), *add_lines((1,))]
        half = PARTS * rows
        sums = [code.builder.fadd(x, y) for x, y in zip(both[:half], both[half:], strict=True)]
    for number, total in enumerate(sums):
        row, offset = number // PARTS, 4 * LANES * (number % PARTS)
        addend = code.load(code.moved(added, added_stride, row), offset)
        result = code.fma(total, scales[number % PARTS], addend)
        code.store(result, code.moved(output, output_stride, row), offset)


@intrinsic
def _tile(
    typing, case, rows, lines, added, output, stride, added_stride, out_stride, count, numbers
):
    """Multiply some rows with some lines of a panel, all of one group.

    Args:
        typing: Numba's.
        case: how many rows; ``TILE`` more where codes have 4 bits, twice that where zeros are
            taken from them.
        rows: their address.
        lines: their address.
        added: the address of what is added to the sums.
        output: the address of what comes of it.
        stride: bytes from one row to the next.
        added_stride: the same of ``added``.
        out_stride: the same of ``output``.
        count: how many lines.
        numbers: address of the group's scales, and of its zeros behind them, in float32.
    """

    def codegen(context, builder, signature, arguments):
        case, *others = arguments
        code = Code(builder)
        cases = {
            rows + TILE * (bits == 4) + 2 * TILE * shifted: partial(
                _write_tile, code, others, rows, bits, shifted
            )
            for shifted in (False, True)
            for bits in (8, 4)
            for rows in range(1, TILE + 1)
        }
        code.choose(case, cases)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 10), codegen


@intrinsic
def _take_scales(typing, kind, scales, factor, target):
    """Widen the scales of a group, times a factor."""

    def codegen(context, builder, signature, arguments):
        kind, scales, factor, target = arguments
        code = Code(builder)

        def write(form, size):
            for part in range(LINE):
                found = code.load(scales, size * LANES * part, form)
                product = builder.fmul(found, code.everywhere(factor))
                code.store(product, target, 4 * LANES * part)

        code.choose(kind, {number: partial(write, *form) for number, form in _KINDS.items()})
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, types.int64), codegen


@intrinsic
def _room(typing):
    """Address of room for a group's scales and zeros, on this thread's stack."""

    def codegen(context, builder, signature, arguments):
        kind = ir.ArrayType(FLOAT, 2 * PANEL_ROWS)
        return builder.ptrtoint(cgutils.alloca_once(builder, kind), I64)

    return types.int64(), codegen


@njit(error_model="numpy")
def _take_zeros(zeros, target):
    for i in range(PANEL_ROWS):
        target[i] = types.float32(zeros[i])


@njit(error_model="numpy")
def _group(rows, stride, count, lines, inputs, bits, shifted, numbers, output, out_stride, bias):
    """Rows times the lines of one group; ``bias`` is where there is none before it, else 0."""
    blocks = (count + TILE - 1) // TILE
    each = types.int64(8) // bits
    for begin in range(0, inputs, DEPTH):
        for turn in range(blocks * (LINE // PARTS)):
            block, column = turn % blocks, turn // blocks * PARTS * LANES
            first = count * block // blocks
            target = output + first * out_stride + 4 * column
            # What has been summed before is added, or else the bias.
            added, added_stride = target, out_stride
            if begin == 0 and bias:
                added, added_stride = bias + 4 * column, types.int64(0)
            _tile(
                count * (block + 1) // blocks - first + (2 * shifted + (bits == 4)) * TILE,
                rows + first * stride + 4 * begin,
                lines + begin // each * PANEL_ROWS + column,
                added,
                target,
                stride,
                added_stride,
                out_stride,
                min(DEPTH, inputs - begin) // each,
                numbers + 4 * column,
            )


@cfunc(types.void(*[types.int64] * 4), cache=True)
def multiply(block, step, piece, member):
    """Rows times a quantised weight, and a bias and other rows added; a piece is a panel."""
    words, counts = integers(block), integers(step)
    rows, stride, codes, bits, depth = words[0], words[1], words[2], words[3], words[4]
    scales, kind, zeros, size, groups = words[5], words[6], words[7], words[8], words[9]
    bias, output, output_stride, count = words[10], words[11], words[12], counts[words[13]]
    factor, added, added_stride = real(words[14]), words[15], words[16]
    if output == 0:
        output = counts[OUTPUT]
    column = 4 * piece * PANEL_ROWS
    bias, output, panel = bias + column, output + column, piece * groups * PANEL_ROWS
    codes += piece * (depth * bits // 8) * PANEL_ROWS
    numbers = _room()
    for group in range(groups):
        begin, at = group * size, panel + group * PANEL_ROWS
        _take_scales(kind, scales + at * (2 if kind else 4), factor, numbers)
        if zeros:
            _take_zeros(bytes_at(zeros + at), floats(numbers + 4 * PANEL_ROWS))
        _group(
            rows + 4 * begin,
            stride,
            count,
            codes + begin * bits // 8 * PANEL_ROWS,
            min(size, depth - begin),
            bits,
            types.int64(1) if zeros else types.int64(0),
            numbers,
            output,
            output_stride,
            bias if group == 0 else types.int64(0),
        )
    if added:
        add_rows(output, output_stride, added + column, added_stride, count)
