"""Norms, and gates between products, row by row."""

import math

from numba import cfunc, njit, types

from uellm_worker.engine.kernels.arithmetic import FAST, exp, floats, integers, real
from uellm_worker.engine.tiles import ROW_PIECE

_GELU = types.float32(1.5957691216057308)
_GELU_CUBE = types.float32(0.044715)


@njit(fastmath=FAST, error_model="numpy")
def _mean(numbers, size):
    total = types.float32(0.0)
    for i in range(size):
        total += numbers[i]
    return total / types.float32(size)


@njit(fastmath=FAST, error_model="numpy")
def _mean_square(numbers, size, mean):
    total = types.float32(0.0)
    for i in range(size):
        total += (numbers[i] - mean) * (numbers[i] - mean)
    return total / types.float32(size)


@njit(error_model="numpy")
def _scaled(numbers, mean, factor, weight, target, size):
    for i in range(size):
        target[i] = (numbers[i] - mean) * factor * weight[i]


@njit(error_model="numpy")
def _add(target, added, factor, size):
    """Target times a factor, and others added."""
    for i in range(size):
        target[i] = added[i] + factor * target[i]


@cfunc(types.void(*[types.int64] * 4), cache=True)
def norm(block, step, piece, member):
    """Norms of rows or their segments; a piece is some rows, or some of those that a table names.

    Root-mean-square norms, or with ``centred`` those of the distance from the mean; times a weight,
    and a bias added; then, if there are other rows, these plus that times a factor.
    """
    words, counts = integers(block), integers(step)
    source, source_stride, target, target_stride = words[0], words[1], words[2], words[3]
    weight, bias, size, segments, centred = words[4], words[5], words[6], words[7], words[8]
    eps, added, added_stride, factor = real(words[9]), words[10], words[11], real(words[12])
    count, table = counts[words[13]], counts[words[14]] if words[14] else types.int64(0)
    for row in range(ROW_PIECE * piece, min(ROW_PIECE * (piece + 1), count)):
        origin = integers(table)[row] if table else row
        for segment in range(segments):
            at = 4 * segment * size
            numbers = floats(source + origin * source_stride + at)
            place = floats(target + row * target_stride + at)
            mean = _mean(numbers, size) if centred else types.float32(0.0)
            scale = types.float32(1.0) / math.sqrt(_mean_square(numbers, size, mean) + eps)
            _scaled(numbers, mean, scale, floats(weight + at), place, size)
            if bias:
                _add(place, floats(bias + at), types.float32(1.0), size)
            if added:
                _add(place, floats(added + row * added_stride + at), factor, size)


@njit(error_model="numpy")
def _times_sigmoid(x, y):
    """``x`` times the sigmoid of ``y``."""
    decay = exp(-abs(y))
    upper = types.float32(1.0) if y >= types.float32(0.0) else decay
    return x * (upper / (types.float32(1.0) + decay))


@njit(error_model="numpy")
def _silu(numbers, target, size):
    for i in range(size):
        target[i] = _times_sigmoid(numbers[i], numbers[i])


@njit(error_model="numpy")
def _gelu(numbers, target, size):
    """By a hyperbolic tangent, which is a sigmoid."""
    for i in range(size):
        x = numbers[i]
        target[i] = _times_sigmoid(x, _GELU * (x + _GELU_CUBE * x * x * x))


@njit(error_model="numpy")
def _multiply(target, others, size):
    for i in range(size):
        target[i] *= others[i]


@cfunc(types.void(*[types.int64] * 4), cache=True)
def activate(block, step, piece, member):
    """SiLU or GELU of a row, times the numbers behind them if these are gates; a piece is a row."""
    words = integers(block)
    numbers, target = words[0] + piece * words[1], words[2] + piece * words[3]
    size, gelu, gated = words[4], words[5], words[6]
    if gelu:
        _gelu(floats(numbers), floats(target), size)
    else:
        _silu(floats(numbers), floats(target), size)
    if gated:
        _multiply(floats(target), floats(numbers + 4 * size), size)
