"""Hashed features of a prompt's words, for a linear model, beside its cues.

A prompt is parted into what is asked, its first paragraph, and what it is asked of, the rest. Long
ones are looked at from both ends.
"""

import re
from collections.abc import Iterable, Sequence
from zlib import crc32

import numpy as np
import numpy.typing as npt

from uellm_profiler.text.cues import Cues, cues_of

BITS = 18
"""Hashed features fall into 2^18 buckets."""
MOST_IDS = 216
HEAD_CHARACTERS = 1500
TAIL_CHARACTERS = 500
_ASKED_WORDS = 60
_REST_WORDS = 40
_STEMMED = 5
_MASK = np.uint32((1 << BITS) - 1)
_WORD = re.compile(r"[^\W\d_]+(?:'[a-z]+)?|\d+|[^\w\s]")

Ids = npt.NDArray[np.uint32]


def seen_of(text: str, prompt_tokens: int) -> tuple[Ids, Cues]:
    """Hashed features of a prompt, ascending, and its cues."""
    stripped = text.strip()
    asked, _, rest = stripped.partition("\n")
    if len(stripped) > HEAD_CHARACTERS + TAIL_CHARACTERS:
        if not rest:
            rest = asked[HEAD_CHARACTERS:]
        asked = asked[:HEAD_CHARACTERS]
        rest = rest[: HEAD_CHARACTERS - len(asked)] + "\n" + rest[-TAIL_CHARACTERS:]
    asked_words, rest_words = _WORD.findall(asked.lower()), _WORD.findall(rest.lower())
    cues = cues_of(
        asked,
        rest,
        asked_words,
        rest_words,
        characters=len(stripped),
        prompt_tokens=prompt_tokens,
    )
    return _ids_of(asked_words, rest_words), cues


def _ids_of(asked: Sequence[str], rest: Sequence[str]) -> Ids:
    head, tail = asked[:_ASKED_WORDS], asked[_ASKED_WORDS:][-20:]
    # Marks for the start and the end, so that pairs tell what a prompt begins and ends with.
    words = ["", *head, *tail, "\n"]
    hashes = _hashed(words)
    inner = hashes[1:-1]
    pairs = [
        inner,
        hashes[:-1] * np.uint32(0x9E3779B1) + hashes[1:],  # neighbours
        inner[:-2] * np.uint32(0x85EBCA77) + inner[2:],  # with one between
        inner[1:] * np.uint32(0xC2B2AE3D) + inner[:1],  # with the first
        inner[:12] * np.uint32(0x27D4EB2F) + np.uint32(len(rest).bit_length()),
        inner[:6] * np.uint32(0x165667B1) + np.uint32(len(asked).bit_length()),
    ]
    others = {"~" if rest else "!"}
    others.update(word[:4] + "*" for word in head if len(word) > _STEMMED)
    others.update("*" + word[-3:] for word in head if len(word) > _STEMMED)
    others.update(" ".join(asked[:count]) + "^" for count in (1, 2, 3, 4))
    others.update(" ".join(asked[-count:]) + "$" for count in (1, 2))
    others.update(word + "~" for word in rest[:_REST_WORDS])
    others.update(word + "~" for word in rest[-_REST_WORDS // 2 :])
    hashed = np.concatenate((*pairs, _hashed(others)))
    mixed = (hashed ^ (hashed >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
    ids: Ids = np.unique((mixed ^ (mixed >> np.uint32(13))) & _MASK)
    # Which are left out of very many is as good as random, and the same whenever.
    return ids[:MOST_IDS]


def _hashed(words: Iterable[str]) -> Ids:
    # Text from JSON may hold halves of surrogate pairs.
    hashes = [crc32(word.encode("utf-8", "surrogatepass")) for word in words]
    return np.array(hashes, dtype=np.uint32)
