"""Kernels for decode steps on CPUs, compiled by Numba; float32.

Importing this module compiles them, or loads what an earlier import left in Numba's cache. Each
is called with a block of numbers, ``native.py`` lays them out, by every thread of an OpenMP team.
"""

from llvmlite import ir
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_BLOCK = 32
"""Tokens whose keys stay in the first-level cache while the queries that share them take turns."""
_LINE = 64
_CALL = 16
"""Tokens that could be read while one more head is begun."""
_FAST = {"contract", "reassoc", "nsz"}
"""What may be done to sums; infinities keep their meaning."""

_thread = types.ExternalFunction("omp_get_thread_num", types.int32())
_threads = types.ExternalFunction("omp_get_num_threads", types.int32())


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
def _real(typing_context, bits):
    """The float64 in a block's place, as float32."""

    def codegen(context, builder, signature, arguments):
        double = builder.bitcast(arguments[0], context.get_value_type(types.float64))
        return builder.fptrunc(double, context.get_value_type(types.float32))

    return types.float32(types.int64), codegen


@intrinsic
def _prefetch(typing_context, address):
    """Have the line at an address read meanwhile; one that is not there is not."""

    def codegen(context, builder, signature, arguments):
        place, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place, flag, flag, flag])
        call = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        at = builder.inttoptr(arguments[0], place)
        builder.call(call, [at, flag(0), flag(3), flag(1)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


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


@njit(fastmath=_FAST, error_model="numpy")
def _scores(query, keys, scores, tokens, size, scaling):
    """Products of a query with ``tokens`` keys that lie behind each other, scaled."""
    for token in range(tokens):
        key = token * size
        total = types.float32(0.0)
        for i in range(size):
            total += query[i] * keys[key + i]
        scores[token] = total * scaling


@njit(fastmath=_FAST, error_model="numpy")
def _weigh(weights, values, output, tokens, size):
    """Add ``tokens`` values that lie behind each other, times their weights, to a row."""
    whole = tokens - tokens % 4
    for token in range(0, whole, 4):
        at = token * size
        a, b, c, d = weights[token], weights[token + 1], weights[token + 2], weights[token + 3]
        for i in range(size):
            output[i] += (
                a * values[at + i]
                + b * values[at + size + i]
                + c * values[at + 2 * size + i]
                + d * values[at + 3 * size + i]
            )
    for token in range(whole, tokens):
        a = weights[token]
        for i in range(size):
            output[i] += a * values[token * size + i]


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
def _read_ahead(address, count):
    for line in range(0, count, _LINE):
        _prefetch(address + line)


@njit(error_model="numpy")
def _attend_head(query, keys, values, output, scores, group, size, tokens, scaling, cap):
    """One token of a sequence, ``group`` queries that share a key head: ``[group, size]``."""
    ahead = 4 * _BLOCK * size
    for start in range(0, tokens, _BLOCK):
        count = min(_BLOCK, tokens - start)
        following = keys + 4 * start * size + ahead
        if start + _BLOCK >= tokens:
            following = values
        _read_ahead(following, ahead)
        for member in range(group):
            _scores(
                floats(query + 4 * member * size),
                floats(keys + 4 * start * size),
                floats(scores + 4 * (member * tokens + start)),
                count,
                size,
                scaling,
            )
    _clear(floats(output), group * size)
    for member in range(group):
        _softmax(floats(scores + 4 * member * tokens), tokens, cap)
    for start in range(0, tokens, _BLOCK):
        count = min(_BLOCK, tokens - start)
        if start + _BLOCK < tokens:
            _read_ahead(values + 4 * start * size + ahead, ahead)
        for member in range(group):
            _weigh(
                floats(scores + 4 * (member * tokens + start)),
                floats(values + 4 * start * size),
                floats(output + 4 * member * size),
                count,
                size,
            )


@cfunc(types.void(types.CPointer(types.int64)), cache=True)
def attend(block):
    """Attend decodes to their slots; every thread takes its share of the tokens."""
    query, query_stride, output = block[0], block[1], block[2]
    scratch, scratch_stride = block[3], block[4]
    slots, positions = integers(block[5]), integers(block[6])
    keys, values, slot_stride, head_stride = block[7], block[8], block[9], block[10]
    rows, kv_heads, group, size, window = block[11], block[12], block[13], block[14], block[15]
    scaling, cap = _real(block[16]), _real(block[17])
    thread, threads = types.int64(_thread()), types.int64(_threads())
    work = types.int64(0)
    for row in range(rows):
        work += (positions[row] + _CALL) * kv_heads
    done = types.int64(0)
    for row in range(rows):
        tokens = positions[row] + 1
        first = max(tokens - window, types.int64(0)) if window > 0 else types.int64(0)
        for head in range(kv_heads):
            # Whoever is to do the work that a head begins with, does all of the head's.
            if work * thread <= done * threads < work * (thread + 1):
                at = slots[row] * slot_stride + head * head_stride + 4 * first * size
                _attend_head(
                    query + row * query_stride + 4 * head * group * size,
                    keys + at,
                    values + at,
                    output + 4 * (row * kv_heads + head) * group * size,
                    scratch + thread * scratch_stride,
                    group,
                    size,
                    tokens - first,
                    scaling,
                    cap,
                )
            done += positions[row] + _CALL


@njit(error_model="numpy")
def _copy(source, target, count):
    for i in range(count):
        target[i] = source[i]


@cfunc(types.void(types.CPointer(types.int64)), cache=True)
def place(block):
    """Rotate queries and keys, and write keys and values to their places; rows are shared out."""
    heads, turns, pairs = block[0], floats(block[1]), block[2]
    slots, positions = integers(block[3]), integers(block[4])
    keys, values, slot_stride, head_stride = block[5], block[6], block[7], block[8]
    rows, count, kv_heads, size = block[9], block[10], block[11], block[12]
    thread, threads = types.int64(_thread()), types.int64(_threads())
    turned = count - kv_heads
    for row in range(rows * thread // threads, rows * (thread + 1) // threads):
        first = heads + 4 * row * count * size
        for head in range(turned):
            numbers = floats(first + 4 * head * size)
            for pair in range(pairs):
                cosine, sine = turns[2 * (row * pairs + pair)], turns[2 * (row * pairs + pair) + 1]
                real, imaginary = numbers[2 * pair], numbers[2 * pair + 1]
                numbers[2 * pair] = real * cosine - imaginary * sine
                numbers[2 * pair + 1] = real * sine + imaginary * cosine
        for head in range(kv_heads):
            at = slots[row] * slot_stride + head * head_stride + 4 * positions[row] * size
            key = first + 4 * (turned - kv_heads + head) * size
            _copy(floats(key), floats(keys + at), size)
            _copy(floats(key + 4 * kv_heads * size), floats(values + at), size)
