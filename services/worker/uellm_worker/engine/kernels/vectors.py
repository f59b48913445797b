"""Writing LLVM code over vectors of floats, for loops that a compiler would not lay out so."""

import platform

from llvmlite import binding, ir
from numba import config
from numba.core import cgutils

LANES = 16
"""Floats of a vector: a register of AVX-512, several elsewhere."""
LINE_BYTES = 64
"""Of a cache line."""


def _features():
    """What the processor that is compiled for can do; Numba may have been told of another one."""
    if config.CPU_FEATURES is not None:
        return {name[1:] for name in config.CPU_FEATURES.split(",") if name.startswith("+")}
    return {name for name, there in binding.get_host_cpu_features().items() if there}


def _vectors():
    """How many vectors the registers hold; 0: too few, or nobody has tried."""
    found = _features()
    if "avx512f" in found:
        return 32
    return 8 if {"avx2", "fma", "f16c"} <= found else 0


VECTORS = _vectors()
FUSES = platform.machine() != "x86_64" or "fma" in _features()
"""Multiplying and adding is one instruction, and not a function of the C library."""

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
FLOAT = ir.FloatType()
VECTOR = ir.VectorType(FLOAT, LANES)
HALVES = ir.VectorType(ir.HalfType(), LANES)
BFLOATS = ir.VectorType(I16, LANES)
"""Of bfloat16, which are the upper halves of floats."""
_WORDS = ir.VectorType(I32, LANES)
_CODES = ir.VectorType(I8, LANES)
ZEROS = ir.Constant(VECTOR, [0.0] * LANES)


def _constants(number):
    return ir.Constant(_WORDS, [number] * LANES)


class Code:
    """Writes code where a builder stands. Addresses are integers.

    Args:
        builder: llvmlite's.
    """

    def __init__(self, builder):
        self.builder = builder

    def moved(self, address, stride, count=1):
        """``count`` strides behind an address."""
        times = I64(count) if isinstance(count, int) else count
        return self.builder.add(address, self.builder.mul(stride, times))

    def at(self, address, offset, kind):
        """The place some bytes behind an address."""
        return self.builder.inttoptr(self.builder.add(address, I64(offset)), kind.as_pointer())

    def load(self, address, offset=0, kind=VECTOR):
        """What lies there; numbers of 16 bits as floats."""
        found = self.builder.load(self.at(address, offset, kind), align=2)
        if kind is BFLOATS:
            upper = self.builder.shl(self.builder.zext(found, _WORDS), _constants(16))
            return self.builder.bitcast(upper, VECTOR)
        return self.builder.fpext(found, VECTOR) if kind is HALVES else found

    def codes(self, address, offset):
        """A vector of whole numbers of 8 bits, in 32 bits."""
        found = self.builder.load(self.at(address, offset, _CODES), align=1)
        return self.builder.sext(found, _WORDS)

    def nibbles(self, codes):
        """The numbers of 4 bits in the lower, and in the upper halves of such."""
        lower = self.builder.ashr(self.builder.shl(codes, _constants(28)), _constants(28))
        return lower, self.builder.ashr(codes, _constants(4))

    def store(self, value, address, offset=0):
        """Put a number or a vector there."""
        self.builder.store(value, self.at(address, offset, value.type), align=4)

    def everywhere(self, number):
        """A vector of one number."""
        nothing = ir.Constant(VECTOR, ir.Undefined)
        single = self.builder.insert_element(nothing, number, I32(0))
        first = ir.Constant(ir.VectorType(I32, LANES), [0] * LANES)
        return self.builder.shuffle_vector(single, nothing, first)

    def fma(self, first, second, added):
        """``first * second + added``."""
        kind = ir.FunctionType(VECTOR, [VECTOR] * 3)
        function = self._function(kind, f"llvm.fma.v{LANES}f32")
        return self.builder.call(function, [first, second, added])

    def total(self, vector):
        """The sum of a vector, in any order."""
        kind = ir.FunctionType(FLOAT, [FLOAT, VECTOR])
        function = self._function(kind, f"llvm.vector.reduce.fadd.v{LANES}f32")
        return self.builder.call(function, [FLOAT(0.0), vector], fastmath=("reassoc",))

    def read_ahead(self, address, offset, count):
        """Have so many bytes, some behind an address, come into the cache if they are there."""
        kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
        function = self._function(kind, "llvm.prefetch.p0")
        for line in range(offset, offset + count, LINE_BYTES):
            self.builder.call(function, [self.at(address, line, I8), I32(0), I32(3), I32(1)])

    def repeat(self, count, values, body):
        """Write a loop that runs at least once.

        Args:
            count: how often.
            values: what it begins with.
            body: writes one run; takes its index and values, gives new values.

        Returns:
            The last values.
        """
        builder = self.builder
        before, loop = builder.block, builder.append_basic_block("loop")
        builder.branch(loop)
        builder.position_at_end(loop)
        index, *now = (builder.phi(first.type) for first in (I64(0), *values))
        then = [builder.add(index, I64(1)), *body(index, now)]
        for value, first, new in zip((index, *now), (I64(0), *values), then, strict=True):
            value.add_incoming(first, before)
            value.add_incoming(new, builder.block)
        done = builder.append_basic_block("done")
        builder.cbranch(builder.icmp_signed("<", then[0], count), loop, done)
        builder.position_at_end(done)
        return then[1:]

    def choose(self, number, cases):
        """Write one piece of code for each of some numbers, one of which it has to be.

        Args:
            number: which.
            cases: by number, what writes the code.
        """
        builder = self.builder
        end, nowhere = builder.append_basic_block("end"), builder.append_basic_block("nowhere")
        choice = builder.switch(number, nowhere)
        for case, write in cases.items():
            block = builder.append_basic_block(f"case{case}")
            choice.add_case(I64(case), block)
            builder.position_at_end(block)
            write()
            builder.branch(end)
        builder.position_at_end(nowhere)
        builder.unreachable()
        builder.position_at_end(end)

    def _function(self, kind, name):
        return cgutils.get_or_insert_function(self.builder.module, kind, name)
