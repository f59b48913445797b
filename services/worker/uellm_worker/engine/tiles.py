"""Sizes and places that the kernels and those who lay out numbers for them agree on.

What a step is comes to kernels as numbers of 8 bytes each: how many there are of what the pieces
of an operation are counted by, then addresses.
"""

HEAD_NUMBERS = 16
"""Heads that kernels attend have a multiple of so many numbers."""
PANEL_ROWS = 32
"""Rows of a weight in a panel."""
ROW_PIECE = 4
"""Rows that are normed, or put in their places, as one piece of work."""
SPAN_ROWS = 8
"""Most rows of a sequence that attend together."""

ONCE, ROWS, ROW_PIECES, SPANS, SAMPLES, SAMPLE_PIECES, SAMPLING, ADAPTED = range(8)
"""Counts of a step: 1, rows, pieces of them, spans, rows that sample, pieces of them, if any do,
and rows again if any has an adapter."""
SLOTS, POSITIONS, SPAN_TABLE, SAMPLE_TABLE, OUTPUT, ADAPTERS, TURNS = range(8, 15)
"""Addresses of a step. What positions are turned by comes last, for each kind of rotation."""

OPERATION_WORDS = 4
"""An operation: the kernel's address, pieces, what of the step these are counted by, the block."""
TICKET, DONE, SLEEPERS, MEMBERS = 0, 8, 16, 24
"""State of a team; each in a cache line of its own."""
PROGRAM, STEP, TIMES = 25, 26, 27
"""What it works at, and where to the time is written when each operation begins; 0: nowhere."""
STATE_WORDS = 32
PIECE_BITS, RUN_SHIFT = 20, 32
"""A ticket: pieces left in the low bits, then the operation, from the shift on the run."""
