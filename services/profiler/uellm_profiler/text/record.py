"""The features of a prompt as a record of bytes, which outlives the prompt and does not contain it.

One byte of version, eight of a fingerprint of the text, the cues as float16, hashed features as
uint32; little endian; at most ``MOST_FEATURE_BYTES``.
"""

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from uellm_profiler.text.cues import CUES, Cues
from uellm_profiler.text.features import BITS, Ids, seen_of

_VERSION = b"\x02"
_PRINT_BYTES = 8
_CUES_AT = 1 + _PRINT_BYTES
_IDS_AT = _CUES_AT + 2 * len(CUES)


@dataclass(frozen=True, slots=True)
class Seen:
    """What is seen of a prompt.

    Attributes:
        fingerprint: of the text, white space and case aside.
        cues: see ``uellm_profiler.text.cues``.
        ids: hashed features, ascending.
    """

    fingerprint: int
    cues: Cues
    ids: Ids

    def packed(self) -> bytes:
        """The record."""
        cues = self.cues.astype("<f2").tobytes()
        ids = self.ids.astype("<u4").tobytes()
        return _VERSION + self.fingerprint.to_bytes(_PRINT_BYTES, "little") + cues + ids


def see(text: str, prompt_tokens: int) -> Seen:
    """Look at a prompt."""
    ids, cues = seen_of(text, prompt_tokens)
    plain = " ".join(text.lower().split()).encode("utf-8", "surrogatepass")
    fingerprint = int.from_bytes(blake2b(plain, digest_size=_PRINT_BYTES).digest(), "little")
    # As precise as the record: what is predicted now is what will be learnt from.
    return Seen(fingerprint, cues.astype("<f2").astype(np.float32), ids)


def unpacked(record: bytes) -> Seen | None:
    """What was seen; None if the record is of another version or damaged."""
    if record[:1] != _VERSION or len(record) <= _IDS_AT or (len(record) - _IDS_AT) % 4:
        return None
    cues = np.frombuffer(record, dtype="<f2", count=len(CUES), offset=_CUES_AT)
    ids = np.frombuffer(record, dtype="<u4", offset=_IDS_AT)
    if not np.isfinite(cues).all() or int(ids.max()) >> BITS:
        return None
    fingerprint = int.from_bytes(record[1:_CUES_AT], "little")
    return Seen(fingerprint, cues.astype(np.float32), ids.astype(np.uint32))
