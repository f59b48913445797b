"""What a client holds of an answer, so that a second delivery shows and a gap does too."""

from dataclasses import dataclass, field

from uellm.v1 import inference_pb2


class GapError(Exception):
    """Tokens are missing: the stream has to be opened again at the offset that is held."""


@dataclass(slots=True)
class Answer:
    """One choice of a request, as received so far.

    Attributes:
        request_id: its id, once accepted.
        next_offset: tokens held; the index of the next one.
        finished: whether its end has come.
    """

    request_id: str = ""
    next_offset: int = 0
    finished: bool = False
    _text_length: int = 0
    _lengths: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lengths[self.next_offset] = 0

    def take(self, event: inference_pb2.GenerationEvent) -> inference_pb2.GenerationEvent | None:
        """The event as far as it is news; None if it is none.

        Raises:
            GapError: if tokens before it are missing.
        """
        kind = event.WhichOneof("event")
        if self.finished:
            return None
        if kind == "accepted":
            known, self.request_id = self.request_id, event.request_id
            return None if known == event.request_id else event
        if kind == "finished":
            if event.finished.usage.output_tokens > self.next_offset:
                raise GapError
            self.finished = True
        elif kind == "tokens":
            return self._take_tokens(event)
        return event

    def _take_tokens(
        self, event: inference_pb2.GenerationEvent
    ) -> inference_pb2.GenerationEvent | None:
        tokens = event.tokens
        held = self.next_offset - tokens.offset
        if held < 0:
            raise GapError
        if held >= len(tokens.ids) and (held or not tokens.text):
            return None
        if held:
            if tokens.offset not in self._lengths:
                raise GapError
            event = inference_pb2.GenerationEvent.FromString(event.SerializeToString())
            tokens = event.tokens
            cut = self._text_length - self._lengths[tokens.offset]
            tokens.text = tokens.text[cut:]
            tokens.offset = self.next_offset
            del tokens.ids[:held]
            del tokens.logprobs[:held]
        self.next_offset += len(tokens.ids)
        self._text_length += len(tokens.text)
        self._lengths[self.next_offset] = self._text_length
        return event
