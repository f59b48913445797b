"""One answer put together from what comes: every token once and in order, whatever comes twice.

Pure; the caller fetches what is missing.
"""

from uellm.v1 import common_pb2, inference_pb2
from uellm.v1.inference_pb2 import GenerationEvent


class Answer:
    """One choice of a request, as far as its client has it.

    Args:
        request_id: whose.
        choice: which of the request's answers.
        next_offset: tokens that the client holds.

    Attributes:
        next_offset: index of the first token that is still to come.
        ended: its end is among the events taken so far or waiting.
        promise: the latest promise, or None.
        finished: its end, or None.
    """

    __slots__ = (
        "_events",
        "_generation",
        "_run",
        "_run_is_ours",
        "choice",
        "finished",
        "next_offset",
        "promise",
        "request_id",
    )

    def __init__(self, request_id: str, choice: int = 0, next_offset: int = 0) -> None:
        self.request_id = request_id
        self.choice = choice
        self.next_offset = next_offset
        self.promise: common_pb2.Promise | None = None
        self.finished: inference_pb2.Finished | None = None
        self._generation = 0
        self._events: list[GenerationEvent] = []
        self._run: inference_pb2.Tokens | None = None
        self._run_is_ours = False

    @property
    def ended(self) -> bool:
        """Whether its end is known and everything before it."""
        return self.finished is not None

    def add_tokens(self, generation: int, tokens: inference_pb2.Tokens) -> bool:
        """Take a run; False if it does not begin where the answer stands, or before it ends.

        A run that is known already, or comes from a holder that was replaced, changes nothing.
        """
        offset, count = tokens.offset, len(tokens.ids)
        if self.finished is not None or offset + count <= self.next_offset:
            return True
        if generation < self._generation:
            return True
        if offset != self.next_offset:
            return False
        self._generation = generation
        self.next_offset = offset + count
        if self._run is None:
            self._run = tokens
            self._run_is_ours = False
            return True
        if not self._run_is_ours:
            mine = inference_pb2.Tokens()
            mine.CopyFrom(self._run)
            self._run = mine
            self._run_is_ours = True
        self._run.ids.extend(tokens.ids)
        self._run.text += tokens.text
        if tokens.logprobs:
            self._run.logprobs.extend(tokens.logprobs)
        return True

    def add_promise(self, promise: common_pb2.Promise) -> None:
        """Take a promise, if it is newer than the last."""
        if self.finished is not None:
            return
        if self.promise is None or promise.revision > self.promise.revision:
            self.promise = promise
            self._close_run()
            self._events.append(
                GenerationEvent(request_id=self.request_id, choice=self.choice, promise=promise)
            )

    def add_finished(self, finished: inference_pb2.Finished) -> bool:
        """Take the end; False if tokens before it are missing."""
        if self.finished is not None:
            return True
        if finished.usage.output_tokens > self.next_offset:
            return False
        self.finished = finished
        self._close_run()
        self._events.append(
            GenerationEvent(request_id=self.request_id, choice=self.choice, finished=finished)
        )
        return True

    def take(self) -> list[GenerationEvent]:
        """The events since the last call; runs that follow each other are one."""
        self._close_run()
        events, self._events = self._events, []
        return events

    def _close_run(self) -> None:
        if self._run is not None:
            self._events.append(
                GenerationEvent(request_id=self.request_id, choice=self.choice, tokens=self._run)
            )
            self._run = None
