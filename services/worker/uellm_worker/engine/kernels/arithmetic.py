"""Numbers at addresses, and functions of numbers, for kernels; float32."""

from numba import njit, types
from numba.extending import intrinsic

FAST = {"contract", "reassoc", "nsz"}
"""What may be done to sums; infinities keep their meaning."""


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
bytes_at = _pointer_to(types.int8)
"""The integers of 8 bits at an address."""


@intrinsic
def real(typing_context, bits):
    """The float64 in a block's place, as float32."""

    def codegen(context, builder, signature, arguments):
        double = builder.bitcast(arguments[0], context.get_value_type(types.float64))
        return builder.fptrunc(double, context.get_value_type(types.float32))

    return types.float32(types.int64), codegen


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
def exp(x):
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
def capped(score, cap):
    """``cap * tanh(score / cap)``: by its series where that is the nearer, else by ``_exp``."""
    x = score / cap
    magnitude = abs(x)
    square = x * x
    series = square * types.float32(62 / 2835) - types.float32(17 / 315)
    series = series * square + types.float32(2 / 15)
    series = series * square - types.float32(1 / 3)
    near = magnitude + magnitude * square * series
    decay = exp(types.float32(-2.0) * magnitude)
    far = (types.float32(1.0) - decay) / (types.float32(1.0) + decay)
    tanh = near if magnitude < types.float32(0.25) else far
    return cap * (tanh if x >= types.float32(0.0) else -tanh)
