"""Marks along prompts, by which it is told which begin alike without looking at them."""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

PIECE_TOKENS = 64
"""Tokens from one mark to the next."""
MOST_MARKS = 128


def prefix_marks(prompt_ids: Sequence[int], scope: str) -> list[int]:
    """A mark after each whole piece of a prompt, over all of it up to there.

    Args:
        prompt_ids: by the model's tokenizer.
        scope: prompts of different scopes have nothing in common; for instance an adapter's name.

    Returns:
        Numbers of 64 bits, at most ``MOST_MARKS``.
    """
    pieces = min(len(prompt_ids) // PIECE_TOKENS, MOST_MARKS)
    if not pieces:
        return []
    tokens = memoryview(array("I", prompt_ids[: pieces * PIECE_TOKENS]))
    content = blake2b(scope.encode(), digest_size=8)
    marks = []
    for start in range(0, len(tokens), PIECE_TOKENS):
        content.update(tokens[start : start + PIECE_TOKENS])
        marks.append(int.from_bytes(content.digest(), "little"))
    return marks
