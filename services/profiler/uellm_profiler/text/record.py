"""The features of a prompt as a record of bytes, which outlives the prompt and does not contain it.

One byte of version, eight of a fingerprint of the text, the cues and what a language model said as
float16, hashed features as uint32; little endian; at most ``MOST_FEATURE_BYTES``.
"""

from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from uellm_profiler.text.cues import CUES, Cues
from uellm_profiler.text.features import BITS, Ids, seen_of

SAID = 6
"""Numbers that a language model says of a prompt; see ``uellm_profiler.llm.network``."""
_VERSIONS = {b"\x02": 0, b"\x03": SAID}
"""Without and with them."""
_PRINT_BYTES = 8
_CUES_AT = 1 + _PRINT_BYTES
_SAID_AT = _CUES_AT + 2 * len(CUES)


def _nothing() -> Cues:
    return np.zeros(0, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Seen:
    """What is seen of a prompt.

    Attributes:
        fingerprint: of the text, white space and case aside.
        cues: see ``uellm_profiler.text.cues``.
        ids: hashed features, ascending.
        said: what a language model says, ``SAID`` numbers; none where it was not asked.
    """

    fingerprint: int
    cues: Cues
    ids: Ids
    said: Cues = field(default_factory=_nothing)

    def packed(self) -> bytes:
        """The record."""
        version = next(v for v, said in _VERSIONS.items() if said == len(self.said))
        numbers = np.concatenate((self.cues, self.said)).astype("<f2").tobytes()
        ids = self.ids.astype("<u4").tobytes()
        return version + self.fingerprint.to_bytes(_PRINT_BYTES, "little") + numbers + ids


def see(text: str, prompt_tokens: int) -> Seen:
    """Look at a prompt."""
    ids, cues = seen_of(text, prompt_tokens)
    plain = " ".join(text.lower().split()).encode("utf-8", "surrogatepass")
    fingerprint = int.from_bytes(blake2b(plain, digest_size=_PRINT_BYTES).digest(), "little")
    return Seen(fingerprint, as_kept(cues), ids)


def as_kept(numbers: Cues) -> Cues:
    """As precise as the record: what is predicted by now is what will be learnt from."""
    return numbers.astype("<f2").astype(np.float32)


def unpacked(record: bytes) -> Seen | None:
    """What was seen; None if the record is of another version or damaged."""
    said = _VERSIONS.get(record[:1], -1)
    ids_at = _SAID_AT + 2 * said
    if said < 0 or len(record) <= ids_at or (len(record) - ids_at) % 4:
        return None
    numbers = np.frombuffer(record, dtype="<f2", count=len(CUES) + said, offset=_CUES_AT)
    ids = np.frombuffer(record, dtype="<u4", offset=ids_at)
    if not np.isfinite(numbers).all() or int(ids.max()) >> BITS:
        return None
    cues, spoken = np.split(numbers.astype(np.float32), [len(CUES)])
    fingerprint = int.from_bytes(record[1:_CUES_AT], "little")
    return Seen(fingerprint, cues, ids.astype(np.uint32), spoken)
