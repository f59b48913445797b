"""One request at its replica's leader, from the batch it came in to the end of its answer."""

from collections.abc import Sequence

from uellm.convert import seconds, slo_from_proto, timestamp, verdict
from uellm.models.tokenizer import Tokenizer
from uellm.streams.keys import model_of
from uellm.streams.messages import Append, Finish, Record, Start
from uellm.v1 import common_pb2, engine_pb2, inference_pb2, queue_pb2
from uellm_worker.answer_text import AnswerText
from uellm_worker.tracing import RequestTrace

Operation = Start | Append | Finish


class Answer:
    """What the engine said of a request and the log does not say yet.

    Args:
        entry: the batch entry that brought it.
        record: its record, of the same generation.
        logged: the output tokens that earlier holders logged.
        tokenizer: of its model.
        trace: its span.

    Attributes:
        request_id: its id.
        generation: what this holder shows to append or finish.
        started: the engine gave it a slot.
        leaving: it is being handed back; what the engine still says of it is left out.
        finish: why it ended, or FINISH_REASON_UNSPECIFIED.
        trace: its span.
    """

    __slots__ = (
        "_entry",
        "_failure",
        "_first_token_at",
        "_logged",
        "_logprobs",
        "_record",
        "_released",
        "_start_due",
        "_text",
        "_token_ids",
        "finish",
        "generation",
        "leaving",
        "request_id",
        "started",
        "trace",
    )

    def __init__(
        self,
        entry: queue_pb2.BatchEntry,
        record: Record,
        logged: Sequence[int],
        tokenizer: Tokenizer,
        trace: RequestTrace,
    ) -> None:
        self.request_id = entry.request_id
        self.generation = entry.generation
        self.started = False
        self.leaving = False
        self.finish: common_pb2.FinishReason.ValueType = common_pb2.FINISH_REASON_UNSPECIFIED
        self.trace = trace
        self._entry = entry
        self._record = record
        self._failure: inference_pb2.Failure | None = None
        self._first_token_at = record.first_token_at
        self._start_due = False
        self._logged = len(logged)
        self._token_ids: list[int] = []
        self._logprobs: list[inference_pb2.TokenLogprobs] = []
        self._released = 0
        sampling = record.payload.sampling
        self._text = AnswerText(
            tokenizer.decoder(record.payload.prompt_ids), sampling.stop, sampling.min_tokens
        )
        for token in logged:
            self._text.push(token)
            if self._text.stop is not None:
                self.finish = common_pb2.FINISH_REASON_STOP
                break
        self._text.take()

    @property
    def prompt_tokens(self) -> int:
        """Length of its prompt."""
        return len(self._record.payload.prompt_ids)

    @property
    def output_tokens(self) -> int:
        """Tokens that were given to the log."""
        return self._logged

    @property
    def first_token_due(self) -> bool:
        """The first token of the answer waits to be logged."""
        return self._logged == 0 and self._released > 0

    def command(self, logged: Sequence[int]) -> engine_pb2.AddSequence:
        """What the engine is told."""
        entry, payload = self._entry, self._record.payload
        return engine_pb2.AddSequence(
            request_id=self.request_id,
            generation=self.generation,
            token_ids=[*payload.prompt_ids, *logged],
            prompt_tokens=len(payload.prompt_ids),
            sampling=payload.sampling,
            slo=entry.slo,
            profile=entry.profile,
            accepted_seconds=seconds(entry.accepted_at),
            rank=entry.rank,
            adapter=payload.adapter,
            tenant=entry.tenant,
            refusable=entry.on_infeasible == common_pb2.ON_INFEASIBLE_REFUSE,
        )

    def admitted(self) -> None:
        """The engine gave it a slot; said to the log once, if no token says so sooner."""
        if not self.started:
            self.started = self._start_due = True

    def fail(self, reason: str, message: str) -> None:
        """End it: it cannot be gone on with."""
        self.finish = common_pb2.FINISH_REASON_FAILED
        self._failure = inference_pb2.Failure(reason=reason, message=message)

    def take(self, output: engine_pb2.SequenceOutput) -> bool:
        """Take what a step gave it; True if a stop string, unknown to the engine, ended it."""
        self.started = True
        text, logprobs = self._text, output.logprobs
        for i, token in enumerate(output.token_ids):
            self._token_ids.append(token)
            if i < len(logprobs):
                self._logprobs.append(logprobs[i])
            if text.push(token):
                self._released = len(self._token_ids)
                if text.stop is not None:
                    self.finish = common_pb2.FINISH_REASON_STOP
                    return output.finish == common_pb2.FINISH_REASON_UNSPECIFIED
        if output.finish:
            self._end(output)
        return False

    def _end(self, output: engine_pb2.SequenceOutput) -> None:
        self._text.flush()
        self._released = len(self._token_ids)
        self.finish = output.finish
        if self._text.stop is not None and not output.HasField("failure"):
            self.finish = common_pb2.FINISH_REASON_STOP
        if output.HasField("failure"):
            self._failure = output.failure

    def operations(self, replica: str, now: float) -> list[Operation]:
        """What the log has to be told, as of ``now``; said only once."""
        operations: list[Operation] = []
        if self._start_due and not self._released:
            operations.append(Start(self.request_id, self.generation))
        self._start_due = False
        if self._released:
            operations.append(Append(self.request_id, self.generation, self._run(now)))
        if self.finish:
            operations.append(self._finish(replica, now))
        return operations

    def _run(self, now: float) -> inference_pb2.Tokens:
        count = self._released
        run = inference_pb2.Tokens(
            offset=self._logged,
            ids=self._token_ids[:count],
            text=self._text.take(),
            logprobs=self._logprobs[:count],
        )
        del self._token_ids[:count], self._logprobs[:count]
        self._logged += count
        self._released = 0
        if self._first_token_at is None:
            self._first_token_at = now
        return run

    def _finish(self, replica: str, now: float) -> Finish:
        entry, record, reason = self._entry, self._record, self.finish
        failed = reason == common_pb2.FINISH_REASON_FAILED
        finished = inference_pb2.Finished(
            reason=reason,
            usage=common_pb2.Usage(prompt_tokens=self.prompt_tokens),
            timings=common_pb2.Timings(
                accepted_at=entry.accepted_at,
                dispatched_at=entry.dispatched_at,
                finished_at=timestamp(now),
            ),
            slo=common_pb2.SloVerdict(met=False) if failed else self._verdict(now),
            stop=self._text.stop or "",
            failure=self._failure,
            replica=replica,
            attempts=entry.attempt,
            batch=record.batch or entry.batch_id,
        )
        if self._first_token_at is not None:
            finished.timings.first_token_at.CopyFrom(timestamp(self._first_token_at))
        completion = queue_pb2.CompletionEvent(
            request_id=self.request_id,
            model=model_of(self.request_id),
            adapter=record.adapter,
            sampling_regime="greedy" if record.entry.greedy else "sampled",
            prompt_tokens=self.prompt_tokens,
            finish_reason=reason,
            censored=reason != common_pb2.FINISH_REASON_STOP,
            plan_epoch=entry.plan_epoch,
            tenant=record.tenant,
            replica=replica,
            features=record.payload.features,
        )
        state = "FAILED" if failed else "DONE"
        return Finish(self.request_id, self.generation, state, finished, completion)

    def _verdict(self, now: float) -> common_pb2.SloVerdict:
        slo = slo_from_proto(self._entry.slo, seconds(self._entry.accepted_at))
        return verdict(slo, self._first_token_at, now, self._logged)
