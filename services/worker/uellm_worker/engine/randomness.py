"""Random numbers that depend on (seed, position) alone, so that a batch cannot change a token.

SplitMix64 is used as a hash: its finaliser is a bijection of 64-bit words with good avalanche,
and two rounds keep neighbouring seeds and positions apart.
"""

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15

RESERVED_IDS = 3
"""Lowest ids that the instant engine never emits: padding, start and end in most vocabularies."""


def _mix(word: int) -> int:
    """The finaliser of SplitMix64 on one 64-bit word."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)


def word(seed: int, position: int) -> int:
    """A 64-bit hash of ``seed`` (taken modulo 2**64) and ``position`` (0 or more)."""
    return _mix((_mix((seed + _GOLDEN) & _MASK) + (position + 1) * _GOLDEN) & _MASK)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for the token at ``position`` of an answer."""
    return (word(seed, position) >> 11) * 2.0**-53


def instant_token(seed: int, position: int, vocab_size: int) -> int:
    """The token that the instant engine puts at ``position`` of an answer.

    The first ``RESERVED_IDS`` ids are left out where the vocabulary is larger than that, so that
    no end-of-sequence token of the usual kind appears in an answer.
    """
    reserved = RESERVED_IDS if vocab_size > RESERVED_IDS else 0
    return reserved + word(seed, position) % (vocab_size - reserved)
