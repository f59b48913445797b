"""The text of one answer, decided token by token.

Text is a function of the tokens alone, however they were cut into steps and whoever fed them. A
token is released once all of its text is decided; until then it is held: an incomplete character
or a possible beginning of a stop string may still change what is sent. Only released tokens are
logged, so everything logged has its text with it, and a later holder of the request learns the
exact state by feeding the logged tokens again.
"""

from collections.abc import Sequence

from uellm.models.tokenizer import IncrementalDecoder, StopChecker


class AnswerText:
    """Turns the tokens of one answer into runs that may be logged.

    Args:
        decoder: of this answer.
        stops: strings before which the answer ends.
        min_tokens: text of the tokens before this many is not searched for stop strings.

    Attributes:
        tokens: tokens fed so far, up to the one that completed a stop string.
        stop: the stop string that ended the answer, or None.
    """

    __slots__ = ("_checker", "_decoder", "_held_text", "_min_tokens", "_text", "stop", "tokens")

    def __init__(
        self, decoder: IncrementalDecoder, stops: Sequence[str] = (), min_tokens: int = 0
    ) -> None:
        self._decoder = decoder
        self._checker = StopChecker(stops) if stops else None
        self._min_tokens = min_tokens
        self._text: list[str] = []
        self._held_text: list[str] = []
        self.tokens = 0
        self.stop: str | None = None

    def push(self, token: int) -> bool:
        """Feed the next token; returns whether all tokens so far are released by it.

        Not to be called after ``stop`` is set.
        """
        self.tokens += 1
        return self._decide(self._decoder.push((token,)))

    def flush(self) -> None:
        """The answer has ended: release what is held. May find a last stop string."""
        if self.stop is not None:
            return
        self._decide(self._decoder.flush())
        if self._checker is not None and self.stop is None:
            self._held_text.append(self._checker.flush())
        self._release()

    def take(self) -> str:
        """The text of the tokens that were released since the last call."""
        text = "".join(self._text)
        self._text.clear()
        return text

    def _decide(self, text: str) -> bool:
        checker = self._checker
        if checker is not None and self.tokens >= self._min_tokens:
            text, self.stop = checker.push(text)
        if text:
            self._held_text.append(text)
        if self.stop is None and (
            self._decoder.pending or (checker is not None and checker.pending)
        ):
            return False
        self._release()
        return True

    def _release(self) -> None:
        self._text += self._held_text
        self._held_text.clear()
