"""Which tokens lie in which slot, and the longest prefix of a sequence among them.

Content is indexed by a chain of hashes: one per whole piece of tokens, over the piece and the hash
before it (Kwon et al., "Efficient Memory Management for Large Language Model Serving with
PagedAttention", SOSP 2023; vLLM's automatic prefix caching). Hashes may collide, so what they find
is compared with the tokens themselves.
"""

from collections.abc import Iterator, Sequence

PIECE_TOKENS = 16
"""Tokens behind one link of the chain; shorter common prefixes are not looked for."""


class PrefixIndex:
    """The content of slots.

    Args:
        slots: how many.
    """

    def __init__(self, slots: int) -> None:
        self._tokens: list[list[int]] = [[] for _ in range(slots)]
        self._chains: list[list[int]] = [[] for _ in range(slots)]
        self._scopes = [""] * slots
        self._holders: dict[int, dict[int, None]] = {}

    def length(self, slot: int) -> int:
        """Tokens that a slot holds."""
        return len(self._tokens[slot])

    def scope(self, slot: int) -> str:
        """The scope of what it holds."""
        return self._scopes[slot]

    def begin(self, slot: int, scope: str) -> None:
        """What an empty slot is going to hold is of this scope."""
        self._scopes[slot] = scope

    def extend(self, slot: int, tokens: Sequence[int]) -> None:
        """A slot holds further tokens."""
        content, chain = self._tokens[slot], self._chains[slot]
        content += tokens
        start = len(chain) * PIECE_TOKENS
        last = chain[-1] if chain else hash(self._scopes[slot])
        for _, key in _links(content[start:], last):
            chain.append(key)
            self._holders.setdefault(key, {})[slot] = None

    def truncate(self, slot: int, length: int) -> None:
        """A slot holds its first tokens only."""
        chain = self._chains[slot]
        for key in chain[length // PIECE_TOKENS :]:
            holders = self._holders[key]
            del holders[slot]
            if not holders:
                del self._holders[key]
        del chain[length // PIECE_TOKENS :]
        del self._tokens[slot][length:]

    def copy(self, source: int, slot: int, length: int) -> None:
        """An empty slot holds the first tokens of another."""
        self.extend(slot, self._tokens[source][:length])

    def longest(self, tokens: Sequence[int], scope: str) -> tuple[int, list[int]]:
        """Length of the longest prefix of a scope that a slot holds, and all slots that do."""
        depth, holders = 0, dict[int, None]()
        for end, key in _links(tokens, hash(scope)):
            if key not in self._holders:
                break
            depth, holders = end, self._holders[key]
        known = list(tokens[:depth])
        lengths = {
            slot: self._common(slot, tokens, depth)
            for slot in sorted(holders)
            if self._scopes[slot] == scope and self._tokens[slot][:depth] == known
        }
        longest = max(lengths.values(), default=0)
        return longest, [slot for slot, length in lengths.items() if length == longest]

    def _common(self, slot: int, tokens: Sequence[int], length: int) -> int:
        """How many tokens agree, if the first ``length`` do."""
        content = self._tokens[slot]
        end = min(len(tokens), len(content))
        while length < end and content[length] == tokens[length]:
            length += 1
        return length


def _links(tokens: Sequence[int], last: int) -> Iterator[tuple[int, int]]:
    """The chain over whole pieces: where each ends, and its hash with all before it."""
    for end in range(PIECE_TOKENS, len(tokens) + 1, PIECE_TOKENS):
        last = hash((last, *tokens[end - PIECE_TOKENS : end]))
        yield end, last
