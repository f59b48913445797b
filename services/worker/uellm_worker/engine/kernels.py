"""Kernels for decode steps on CPUs, compiled by Numba; float32.

Importing this module compiles them, or loads what an earlier import left in Numba's cache. Each
is called with a block of numbers, ``native.py`` lays them out, by every thread of an OpenMP team.
"""

import math
from functools import partial

from numba import cfunc, njit, types
from numba.extending import intrinsic

from uellm_worker.engine.vectors import FLOAT, I64, LANES, LINE_BYTES, ZEROS, Code

_QUERIES, _TOKENS, _PARTS = 2, 4, 4
"""Queries and keys that are multiplied at a time, and vectors of values that are summed."""
_BLOCK = 32
"""Tokens whose keys stay in the first-level cache while the queries that share them take turns."""
_FAST = {"contract", "reassoc", "nsz"}
"""What may be done to sums; infinities keep their meaning."""

_thread_number = types.ExternalFunction("omp_get_thread_num", types.int32())


def _pointer_to(kind):
    @intrinsic
    def pointer(typing_context, address):
        def codegen(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(types.CPointer(kind)))

        return types.CPointer(kind)(types.int64), codegen

    return pointer


floats = _pointer_to(types.float32)
"""The floats at an address."""
integers = _pointer_to(types.int64)
"""The integers at an address."""


@intrinsic
def real(typing_context, bits):
    """The float64 in a block's place, as float32."""

    def codegen(context, builder, signature, arguments):
        double = builder.bitcast(arguments[0], context.get_value_type(types.float64))
        return builder.fptrunc(double, context.get_value_type(types.float32))

    return types.float32(types.int64), codegen


@intrinsic
def _read_ahead(typing, address, count):
    """Have so many bytes, a multiple of a line's, come into the cache if they are there."""

    def codegen(context, builder, signature, arguments):
        address, count = arguments
        code = Code(builder)
        lines = builder.sdiv(count, I64(LINE_BYTES))

        def line(index, _):
            code.read_ahead(code.moved(address, I64(LINE_BYTES), index), 0, LINE_BYTES)
            return []

        code.repeat(lines, [], line)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def take(typing, block):
    """The next piece of work that no thread has taken: a block's first number counts them.

    A thread that the system has stopped for a while then holds up one piece, and not its share.
    """

    def codegen(context, builder, signature, arguments):
        return builder.atomic_rmw("add", arguments[0], I64(1), "monotonic")

    return types.int64(types.CPointer(types.int64)), codegen


@intrinsic
def _power_of_two(typing_context, exponent):
    """The float 2 ** exponent, of an int32 from -126 to 127."""

    def codegen(context, builder, signature, arguments):
        bits = builder.shl(
            builder.add(arguments[0], context.get_constant(types.int32, 127)),
            context.get_constant(types.int32, 23),
        )
        return builder.bitcast(bits, context.get_value_type(types.float32))

    return types.float32(types.int32), codegen


@njit(inline="always")
def _exp(x):
    """E ** x for x <= 88, in float32; Cody and Waite's reduction, Cephes' polynomial."""
    x = max(x, types.float32(-87.0))
    n = types.int32(x * types.float32(1.44269504088896341) - types.float32(0.5))
    k = types.float32(n)
    r = x - k * types.float32(0.693359375) - k * types.float32(-2.12194440e-4)
    p = types.float32(1.9875691500e-4)
    p = p * r + types.float32(1.3981999507e-3)
    p = p * r + types.float32(8.3334519073e-3)
    p = p * r + types.float32(4.1665795894e-2)
    p = p * r + types.float32(1.6666665459e-1)
    p = p * r + types.float32(5.0000001201e-1)
    return (p * r * r + r + types.float32(1.0)) * _power_of_two(n)


@njit(inline="always")
def _capped(score, cap):
    """``cap * tanh(score / cap)``: by its series where that is the nearer, else by ``_exp``."""
    x = score / cap
    magnitude = abs(x)
    square = x * x
    series = square * types.float32(62 / 2835) - types.float32(17 / 315)
    series = series * square + types.float32(2 / 15)
    series = series * square - types.float32(1 / 3)
    near = magnitude + magnitude * square * series
    decay = _exp(types.float32(-2.0) * magnitude)
    far = (types.float32(1.0) - decay) / (types.float32(1.0) + decay)
    tanh = near if magnitude < types.float32(0.25) else far
    return cap * (tanh if x >= types.float32(0.0) else -tanh)


def _write_scores(code, arguments, queries, tokens):
    """Products of some queries with some keys; see ``_score``."""
    query, keys, scores, score_stride, parts, scaling = arguments
    builder = code.builder
    bytes_ = builder.mul(parts, I64(4 * LANES))

    def part(index, sums):
        offset = builder.mul(index, I64(4 * LANES))
        found = [code.load(code.moved(builder.add(keys, offset), bytes_, t)) for t in range(tokens)]
        results = []
        for number in range(queries):
            given = code.load(code.moved(builder.add(query, offset), bytes_, number))
            before = sums[tokens * number : tokens * (number + 1)]
            results += [code.fma(given, k, b) for k, b in zip(found, before, strict=True)]
        return results

    sums = code.repeat(parts, [ZEROS] * (queries * tokens), part)
    for number, vector in enumerate(sums):
        target = code.moved(scores, score_stride, number // tokens)
        total = builder.fmul(code.total(vector), scaling)
        code.store(total, target, 4 * (number % tokens))


@intrinsic
def _score(typing, case, query, keys, scores, score_stride, parts, scaling):
    """Products of one or two queries with one or ``_TOKENS`` keys, times a factor.

    Args:
        typing: Numba's.
        case: how many queries, and ``_QUERIES`` more where it is one key.
        query: address of the queries, which lie behind each other.
        keys: address of the keys, likewise.
        scores: address of what comes of it.
        score_stride: bytes from one query's scores to the next one's.
        parts: vectors of a query.
        scaling: the factor.
    """

    def codegen(context, builder, signature, arguments):
        case, *others = arguments
        code = Code(builder)
        cases = {
            queries + _QUERIES * (tokens == 1): partial(
                _write_scores, code, others, queries, tokens
            )
            for queries in range(1, _QUERIES + 1)
            for tokens in (1, _TOKENS)
        }
        code.choose(case, cases)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6, types.float32), codegen


def _write_weigh(code, arguments, queries, parts):
    """Sums of values by weights; see ``_weigh``."""
    weights, weight_stride, values, stride, output, count = arguments

    def token(index, sums):
        value = code.moved(values, stride, index)
        found = [code.load(value, 4 * LANES * part) for part in range(parts)]
        results = []
        for number in range(queries):
            weight = code.moved(code.moved(weights, weight_stride, number), I64(4), index)
            given = code.everywhere(code.load(weight, 0, FLOAT))
            before = sums[parts * number : parts * (number + 1)]
            results += [code.fma(given, v, b) for v, b in zip(found, before, strict=True)]
        return results

    places = [
        (code.moved(output, stride, number), 4 * LANES * part)
        for number in range(queries)
        for part in range(parts)
    ]
    sums = [code.load(*place) for place in places]
    for vector, place in zip(code.repeat(count, sums, token), places, strict=True):
        code.store(vector, *place)


@intrinsic
def _weigh(typing, case, weights, weight_stride, values, stride, output, count):
    """Add values, times the weights that one or two queries give them, to rows of the output.

    Args:
        typing: Numba's.
        case: how many vectors of each value, and ``_PARTS`` more where queries are two.
        weights: address of the first query's.
        weight_stride: bytes from one query's weights to the next one's.
        values: their address.
        stride: bytes from one value, or row of the output, to the next.
        output: its address.
        count: how many values.
    """

    def codegen(context, builder, signature, arguments):
        case, *others = arguments
        code = Code(builder)
        cases = {
            parts + _PARTS * (queries - 1): partial(_write_weigh, code, others, queries, parts)
            for queries in range(1, _QUERIES + 1)
            for parts in range(1, _PARTS + 1)
        }
        code.choose(case, cases)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), codegen


@njit(fastmath={"contract", "reassoc", "nsz"}, error_model="numpy")
def _softmax(scores, count, cap):
    """Put weights in the place of scores."""
    if cap > types.float32(0.0):
        for i in range(count):
            scores[i] = _capped(scores[i], cap)
    highest = scores[0]
    for i in range(count):
        highest = max(highest, scores[i])
    total = types.float32(0.0)
    for i in range(count):
        # What is not a number has to come out, and ``_exp`` takes no heed of it.
        total += scores[i] * types.float32(0.0)
    for i in range(count):
        scores[i] = _exp(scores[i] - highest)
    for i in range(count):
        total += scores[i]
    factor = types.float32(1.0) / total
    for i in range(count):
        scores[i] *= factor


@njit(error_model="numpy")
def _clear(target, count):
    for i in range(count):
        target[i] = types.float32(0.0)


@njit(error_model="numpy")
def _score_block(query, keys, scores, score_stride, group, size, tokens, scaling):
    """Scores of ``tokens`` keys, which stay in the first-level cache meanwhile."""
    parts, row = size // LANES, 4 * size
    for member in range(0, group, _QUERIES):
        queries = min(_QUERIES, group - member)
        given, target = query + member * row, scores + member * score_stride
        whole = tokens - tokens % _TOKENS
        for token in range(0, whole, _TOKENS):
            _score(
                queries, given, keys + token * row, target + 4 * token, score_stride, parts, scaling
            )
        for token in range(whole, tokens):
            case = queries + _QUERIES
            _score(
                case, given, keys + token * row, target + 4 * token, score_stride, parts, scaling
            )


@njit(error_model="numpy")
def _weigh_block(weights, weight_stride, values, output, group, size, tokens):
    """Add ``tokens`` values, times their weights, to the rows of the output."""
    parts, row = size // LANES, 4 * size
    for member in range(0, group, _QUERIES):
        queries = min(_QUERIES, group - member)
        given, target = weights + member * weight_stride, output + member * row
        for part in range(0, parts, _PARTS):
            at = 4 * LANES * part
            case = min(_PARTS, parts - part) + _PARTS * (queries - 1)
            _weigh(case, given, weight_stride, values + at, row, target + at, tokens)


@njit(error_model="numpy")
def _attend_head(query, keys, values, output, scores, group, size, tokens, scaling, cap):
    """One token of a sequence, ``group`` queries that share a key head: ``[group, size]``."""
    stride, ahead = 4 * tokens, 4 * _BLOCK * size
    for start in range(0, tokens, _BLOCK):
        count, block = min(_BLOCK, tokens - start), keys + 4 * start * size
        _read_ahead(block + ahead if start + _BLOCK < tokens else values, ahead)
        _score_block(query, block, scores + 4 * start, stride, group, size, count, scaling)
    _clear(floats(output), group * size)
    for member in range(group):
        _softmax(floats(scores + member * stride), tokens, cap)
    for start in range(0, tokens, _BLOCK):
        count, block = min(_BLOCK, tokens - start), values + 4 * start * size
        _read_ahead(block + ahead, ahead)
        _weigh_block(scores + 4 * start, stride, block, output, group, size, count)


@cfunc(types.void(types.CPointer(types.int64)), cache=True)
def attend(block):
    """Attend decodes to their slots; a piece of work is a key head of a row."""
    query, query_stride, output = block[1], block[2], block[3]
    scratch, scratch_stride = block[4], block[5]
    slots, positions = integers(block[6]), integers(block[7])
    keys, values, slot_stride, head_stride = block[8], block[9], block[10], block[11]
    rows, kv_heads, group, size, window = block[12], block[13], block[14], block[15], block[16]
    scaling, cap = real(block[17]), real(block[18])
    scores = scratch + types.int64(_thread_number()) * scratch_stride
    piece = take(block)
    while piece < rows * kv_heads:
        row, head = piece // kv_heads, piece % kv_heads
        tokens = positions[row] + 1
        first = max(tokens - window, types.int64(0)) if window > 0 else types.int64(0)
        at = slots[row] * slot_stride + head * head_stride + 4 * first * size
        _attend_head(
            query + row * query_stride + 4 * head * group * size,
            keys + at,
            values + at,
            output + 4 * piece * group * size,
            scores,
            group,
            size,
            tokens - first,
            scaling,
            cap,
        )
        piece = take(block)


@njit(error_model="numpy")
def _copy(source, target, count):
    for i in range(count):
        target[i] = source[i]


@njit(error_model="numpy")
def _turn(numbers, turns, pairs):
    """Turn pairs of numbers, in place, as complex numbers are multiplied."""
    for pair in range(pairs):
        cosine, sine = turns[2 * pair], turns[2 * pair + 1]
        real, imaginary = numbers[2 * pair], numbers[2 * pair + 1]
        numbers[2 * pair] = real * cosine - imaginary * sine
        numbers[2 * pair + 1] = real * sine + imaginary * cosine


@cfunc(types.void(types.CPointer(types.int64)), cache=True)
def place(block):
    """Rotate queries and keys, and write keys and values to their places, row by row."""
    heads, turns, pairs = block[1], block[2], block[3]
    slots, positions = integers(block[4]), integers(block[5])
    keys, values, slot_stride, head_stride = block[6], block[7], block[8], block[9]
    rows, count, kv_heads, size = block[10], block[11], block[12], block[13]
    turned = count - kv_heads
    row = take(block)
    while row < rows:
        first = heads + 4 * row * count * size
        for head in range(turned):
            _turn(floats(first + 4 * head * size), floats(turns + 8 * row * pairs), pairs)
        for head in range(kv_heads):
            at = slots[row] * slot_stride + head * head_stride + 4 * positions[row] * size
            key = first + 4 * (turned - kv_heads + head) * size
            _copy(floats(key), floats(keys + at), size)
            _copy(floats(key + 4 * kv_heads * size), floats(values + at), size)
        row = take(block)


@njit(fastmath=_FAST, error_model="numpy")
def _mean_square(numbers, size):
    total = types.float32(0.0)
    for i in range(size):
        total += numbers[i] * numbers[i]
    return total / types.float32(size)


@njit(error_model="numpy")
def _multiplied(numbers, factor, weight, target, size):
    for i in range(size):
        target[i] = numbers[i] * factor * weight[i]


@cfunc(types.void(types.CPointer(types.int64)), cache=True)
def norm(block):
    """The root-mean-square norm, row by row."""
    source, weight, target, rows, size = block[1], block[2], block[3], block[4], block[5]
    eps = real(block[6])
    row = take(block)
    while row < rows:
        numbers = floats(source + 4 * row * size)
        scale = types.float32(1.0) / math.sqrt(_mean_square(numbers, size) + eps)
        _multiplied(numbers, scale, floats(weight), floats(target + 4 * row * size), size)
        row = take(block)


@njit(error_model="numpy")
def _gated(gates, values, target, size):
    for i in range(size):
        x = gates[i]
        decay = _exp(-abs(x))
        sigmoid = (types.float32(1.0) if x >= types.float32(0.0) else decay) / (
            types.float32(1.0) + decay
        )
        target[i] = x * sigmoid * values[i]


@cfunc(types.void(types.CPointer(types.int64)), cache=True)
def gate(block):
    """Values times the SiLU of their gates, row by row; gates come first in a row."""
    source, target, rows, size = block[1], block[2], block[3], block[4]
    row = take(block)
    while row < rows:
        gates = source + 8 * row * size
        _gated(floats(gates), floats(gates + 4 * size), floats(target + 4 * row * size), size)
        row = take(block)
