"""Token ids to text, a few at a time, with the text that decoding them all at once gives.

Two ways. Where every token is a fixed run of bytes (byte-level BPE; sentencepiece with byte
fallback) the runs are joined and decoded as UTF-8 incrementally. Anywhere else a short window of
tokens is decoded again with each push and the difference is the news.
"""

import codecs
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import tokenizers

_REPLACEMENT = "\ufffd"
_SLICE_TOKENS = 16
_MOST_PENDING_TOKENS = 2 * _SLICE_TOKENS


class IncrementalDecoder(Protocol):
    """Turns the ids of one answer into text as they come."""

    @property
    def pending(self) -> bool:
        """Whether text of the ids so far is still to come: an incomplete character."""
        ...

    def push(self, ids: Sequence[int]) -> str:
        """Text that became complete with ``ids``; never ends inside a UTF-8 character."""
        ...

    def flush(self) -> str:
        """What is left at the end of the answer; an incomplete character becomes U+FFFD."""
        ...


@dataclass(frozen=True, slots=True)
class ByteRendering:
    """How a tokenizer's tokens become bytes.

    Attributes:
        piece: bytes of a token, given as the vocabulary spells it.
        strip: the character that is taken off the start of the text, or "".
        strip_most: how many of it.
    """

    piece: Callable[[str], bytes]
    strip: str = ""
    strip_most: int = 0


def _byte_alphabet() -> dict[str, int]:
    """The inverse of byte-level BPE's printable alphabet: bytes that do not print are moved up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(moved)}


_ALPHABET = _byte_alphabet()


def _byte_level_piece(token: str) -> bytes:
    try:
        return bytes([_ALPHABET[character] for character in token])
    except KeyError:  # an added token, spelt as it reads
        return token.encode()


def _byte_fallback_piece(replacements: Sequence[tuple[str, str]]) -> Callable[[str], bytes]:
    def piece(token: str) -> bytes:
        for old, new in replacements:
            token = token.replace(old, new)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass
        return token.encode()

    return piece


def byte_rendering(decoder: dict[str, Any] | None) -> ByteRendering | None:
    """How tokens become bytes under a tokenizer.json's ``decoder``; None: not token by token."""
    steps = [decoder] if decoder else []
    while any(step["type"] == "Sequence" for step in steps):
        steps = [s for step in steps for s in step.get("decoders", [step])]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return ByteRendering(_byte_level_piece)
    replaces = [step for step in steps if step["type"] == "Replace"]
    patterns = [(step["pattern"].get("String"), step["content"]) for step in replaces]
    if kinds[len(replaces) :] not in (["ByteFallback", "Fuse"], ["ByteFallback", "Fuse", "Strip"]):
        return None
    if any(old is None for old, _ in patterns) or kinds[: len(replaces)].count("Replace") != len(
        replaces
    ):
        return None
    piece = _byte_fallback_piece(patterns)
    if kinds[-1] != "Strip":
        return ByteRendering(piece)
    if steps[-1]["stop"] != 0:
        return None
    return ByteRendering(piece, steps[-1]["content"], steps[-1]["start"])


class Pieces(dict[int, bytes]):
    """Bytes of each token id, filled as they are met; special and unknown ids have none."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, rendering: ByteRendering, special: Collection[int]
    ) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._special = special
        self.rendering = rendering

    def __missing__(self, token_id: int) -> bytes:
        token = None if token_id in self._special else self._tokenizer.id_to_token(token_id)
        piece = b"" if token is None else self.rendering.piece(token)
        self[token_id] = piece
        return piece


class ByteDecoder:
    """Joins the tokens' bytes. A run of bytes that is no UTF-8 keeps what of it is.

    (The ``tokenizers`` library drops the valid characters of such a run too when it decodes byte
    fallback; it sees the whole run, which a stream cannot wait for.)

    Args:
        pieces: bytes of each token.
        at_start: whether the answer begins the text, so that its leading space is stripped.
    """

    def __init__(self, pieces: Pieces, *, at_start: bool) -> None:
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_left = pieces.rendering.strip_most if at_start else 0

    @property
    def pending(self) -> bool:
        """See IncrementalDecoder."""
        return bool(self._utf8.getstate()[0])

    def push(self, ids: Sequence[int]) -> str:
        """See IncrementalDecoder."""
        pieces = self._pieces
        return self._stripped(self._utf8.decode(b"".join([pieces[i] for i in ids])))

    def flush(self) -> str:
        """See IncrementalDecoder."""
        return self._stripped(self._utf8.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        while self._strip_left and text:
            if not text.startswith(self._pieces.rendering.strip):
                self._strip_left = 0
                break
            text = text[1:]
            self._strip_left -= 1
        return text


class WindowDecoder:
    """Decodes a window of tokens again with each push.

    Args:
        decode: ids to text, special tokens left out.
        special: ids that give no text.
        context: ids in front of the answer, if it does not begin the text.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        special: Collection[int],
        context: Sequence[int] = (),
    ) -> None:
        self._decode = decode
        self._special = special
        self._context = [i for i in context if i not in special][-_SLICE_TOKENS:]
        self._pending: list[int] = []
        self._sent = len(decode(self._context))

    @property
    def pending(self) -> bool:
        """See IncrementalDecoder."""
        return bool(self._pending)

    def push(self, ids: Sequence[int]) -> str:
        """See IncrementalDecoder."""
        kept = [i for i in ids if i not in self._special]
        slices = range(0, len(kept), _SLICE_TOKENS)
        return "".join([self._advance(kept[i : i + _SLICE_TOKENS]) for i in slices])

    def flush(self) -> str:
        """See IncrementalDecoder."""
        text = self._decode(self._context + self._pending)[self._sent :]
        self._settle(len(self._pending))
        return text

    def _advance(self, ids: list[int]) -> str:
        self._pending += ids
        whole = self._decode(self._context + self._pending)
        if not whole.endswith(_REPLACEMENT):
            text = whole[self._sent :]
            self._settle(len(self._pending))
            return text
        stable = len(whole.rstrip(_REPLACEMENT))
        if len(self._pending) >= _MOST_PENDING_TOKENS:
            return self._shorten(whole)
        text = whole[self._sent : stable]
        self._sent = max(self._sent, stable)
        return text

    def _shorten(self, whole: str) -> str:
        """Settle up to the last place that is not inside a character, or all if there is none."""
        for cut in range(len(self._pending) - 1, len(self._pending) - 8, -1):
            settled = self._decode(self._context + self._pending[:cut])
            if not settled.endswith(_REPLACEMENT):
                text = settled[self._sent :]
                self._settle(cut)
                return text
        text = whole[self._sent :]
        self._settle(len(self._pending))
        return text

    def _settle(self, count: int) -> None:
        """Make the first ``count`` pending tokens, all sent, the context of the next."""
        if count:
            self._context = self._pending[:count]
            self._pending = self._pending[count:]
        self._sent = len(self._decode(self._context))
