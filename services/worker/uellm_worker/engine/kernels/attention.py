"""Attention over a slot cache, for rows of any sequences: decodes and prompts alike.

A row's result does not depend on what else is computed with it, nor on how its prompt was cut.
"""

from functools import partial

from numba import cfunc, njit, types
from numba.extending import intrinsic

from uellm_worker.engine.kernels.arithmetic import FAST, capped, exp, floats, integers, real
from uellm_worker.engine.kernels.vectors import FLOAT, I64, LANES, LINE_BYTES, VECTORS, ZEROS, Code
from uellm_worker.engine.tiles import POSITIONS, ROW_PIECE, ROWS, SLOTS, SPAN_TABLE, TURNS

_QUERIES, _TOKENS, _PARTS = (2, 4, 4) if VECTORS > 16 else (2, 2, 2)
"""Queries and keys that are multiplied at a time, and vectors of values that are summed."""
_BLOCK = 32
"""Tokens whose keys stay in the first-level cache while the queries that share them take turns."""


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


@njit(fastmath=FAST, error_model="numpy")
def _softmax(scores, count, cap):
    """Put weights in the place of scores."""
    if cap > types.float32(0.0):
        for i in range(count):
            scores[i] = capped(scores[i], cap)
    highest = scores[0]
    for i in range(count):
        highest = max(highest, scores[i])
    total = types.float32(0.0)
    for i in range(count):
        # What is not a number has to come out, and ``exp`` takes no heed of it.
        total += scores[i] * types.float32(0.0)
    for i in range(count):
        scores[i] = exp(scores[i] - highest)
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
def _first(last, window):
    """The first token that is seen from the one before ``last``."""
    return max(last - window, types.int64(0)) if window > 0 else types.int64(0)


@njit(error_model="numpy")
def _attend_span(
    query,
    query_stride,
    output,
    output_stride,
    keys,
    values,
    scores,
    count,
    position,
    group,
    size,
    window,
    scaling,
    cap,
):
    """Some rows of a sequence, ``group`` queries of each that share a key head."""
    begin, end, row_bytes = _first(position + 1, window), position + count, 4 * size
    stride, ahead = 4 * (end - begin), _BLOCK * row_bytes
    begin -= begin % _BLOCK
    for block in range(begin, end, _BLOCK):
        after = block + _BLOCK
        _read_ahead(keys + after * row_bytes if after < end else values + begin * row_bytes, ahead)
        for row in range(count):
            last = position + row + 1
            first = _first(last, window)
            start, tokens = max(first, block), min(last, after) - max(first, block)
            if tokens > 0:
                _score_block(
                    query + row * query_stride,
                    keys + start * row_bytes,
                    scores + row * group * stride + 4 * (start - first),
                    stride,
                    group,
                    size,
                    tokens,
                    scaling,
                )
    for row in range(count):
        last = position + row + 1
        _clear(floats(output + row * output_stride), group * size)
        for member in range(group):
            weights = floats(scores + (row * group + member) * stride)
            _softmax(weights, last - _first(last, window), cap)
    for block in range(begin, end, _BLOCK):
        after = block + _BLOCK
        _read_ahead(values + after * row_bytes, ahead)
        for row in range(count):
            last = position + row + 1
            first = _first(last, window)
            start, tokens = max(first, block), min(last, after) - max(first, block)
            if tokens > 0:
                _weigh_block(
                    scores + row * group * stride + 4 * (start - first),
                    stride,
                    values + start * row_bytes,
                    output + row * output_stride,
                    group,
                    size,
                    tokens,
                )


@cfunc(types.void(*[types.int64] * 4), cache=True)
def attend(block, step, piece, member):
    """Attend rows to their slots; a piece is a key head of a span."""
    words = integers(block)
    query, query_stride, output, output_stride = words[0], words[1], words[2], words[3]
    scratch, scratch_stride = words[4], words[5]
    keys, values, slot_stride, head_stride = words[6], words[7], words[8], words[9]
    kv_heads, group, size, window = words[10], words[11], words[12], words[13]
    scaling, cap = real(words[14]), real(words[15])
    head = piece % kv_heads
    span = integers(integers(step)[SPAN_TABLE] + 32 * (piece // kv_heads))
    row, at = span[0], span[2] * slot_stride + head * head_stride
    column = 4 * head * group * size
    _attend_span(
        query + row * query_stride + column,
        query_stride,
        output + row * output_stride + column,
        output_stride,
        keys + at,
        values + at,
        scratch + member * scratch_stride,
        span[1],
        span[3],
        group,
        size,
        window,
        scaling,
        cap,
    )


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


@cfunc(types.void(*[types.int64] * 4), cache=True)
def place(block, step, piece, member):
    """Rotate queries and keys, and write keys and values to their places; a piece is some rows."""
    words, counts = integers(block), integers(step)
    heads, stride, kind, pairs = words[0], words[1], words[2], words[3]
    keys, values, slot_stride, head_stride = words[4], words[5], words[6], words[7]
    turned, kv_heads, size = words[8], words[9], words[10]
    turns = counts[TURNS + kind] if pairs else types.int64(0)
    slots, positions = integers(counts[SLOTS]), integers(counts[POSITIONS])
    for row in range(ROW_PIECE * piece, min(ROW_PIECE * (piece + 1), counts[ROWS])):
        first = heads + row * stride
        if pairs:
            at = floats(turns + 8 * positions[row] * pairs)
            for head in range(turned):
                _turn(floats(first + 4 * head * size), at, pairs)
        for head in range(kv_heads):
            at = slots[row] * slot_stride + head * head_stride + 4 * positions[row] * size
            key = first + 4 * (turned - kv_heads + head) * size
            _copy(floats(key), floats(keys + at), size)
            _copy(floats(key + 4 * kv_heads * size), floats(values + at), size)
