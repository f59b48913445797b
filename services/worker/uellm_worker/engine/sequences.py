"""A sequence in the engine, from the command that brought it to its last token."""

from collections.abc import Collection
from dataclasses import dataclass, field
from math import inf

from uellm.convert import profile_from_proto, slo_from_proto
from uellm.core.request import QuantileFunction, ResourceProfile, Slo
from uellm.policy.reserving import reserve_tokens
from uellm.policy.views import SequenceView
from uellm.v1.common_pb2 import (
    FINISH_REASON_FAILED,
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    FINISH_REASON_UNSPECIFIED,
    FinishReason,
    Sampling,
)
from uellm.v1.engine_pb2 import AddSequence, SequenceOutput
from uellm.v1.inference_pb2 import Failure, TokenLogprobs
from uellm_worker.engine.capacity import Capacity, Vocabulary


class SequenceError(Exception):
    """A sequence that cannot be served; the others go on.

    Attributes:
        reason: a constant in UPPER_SNAKE_CASE.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(slots=True, eq=False)
class Sequence:
    """A sequence and how far it is.

    Attributes:
        request_id: its id.
        generation: the holder's generation of the request, for the agent.
        tokens: prompt, tokens logged by earlier holders, tokens generated here.
        prompt_tokens: how many of them are prompt; the answer starts behind.
        given_tokens: how many of them came with the command.
        limit_tokens: most that ``tokens`` may grow to.
        sampling: how tokens are chosen.
        slo: when it is needed.
        profile: what it will need.
        rank: place in the scheduler's order.
        arrived_at: when it came, seconds since the epoch.
        adapter: its LoRA adapter's name; "": none.
        tenant: whose it is.
        refusable: it is not wanted any more if its deadline passes before it has begun.
        slot: where its KV cache lies, or -1 while it waits.
        computed_tokens: tokens whose KV is in the cache once the steps under way are computed.
        prefill_tokens: tokens to prefill since it was last given a slot.
        reached_tokens: most of its tokens that were ever computed.
        preemptions: how often its slot was taken.
        proven: a token was chosen since it was given its slot, from finite logits.
        announced: the agent was told of its first step.
        first_token_at: when its first token here came, seconds since the epoch, or None.
    """

    request_id: str
    generation: int
    tokens: list[int]
    prompt_tokens: int
    given_tokens: int
    limit_tokens: int
    sampling: Sampling
    slo: Slo
    profile: ResourceProfile
    rank: int
    arrived_at: float
    adapter: str = ""
    tenant: str = ""
    refusable: bool = False
    slot: int = -1
    computed_tokens: int = 0
    prefill_tokens: int = 0
    reached_tokens: int = 0
    preemptions: int = 0
    proven: bool = False
    announced: bool = False
    first_token_at: float | None = None
    _waiting_view: SequenceView | None = field(default=None, init=False)

    @property
    def expires_at(self) -> float:
        """When it is not wanted any more unless it has begun; infinite: it always is."""
        begun = len(self.tokens) > self.prompt_tokens
        deadline = self.slo.deadline_at
        return inf if begun or not self.refusable or deadline is None else deadline

    @property
    def decoding(self) -> bool:
        """The prompt is done; each step computes the newest token."""
        return self.computed_tokens >= self.prefill_tokens

    @property
    def ready(self) -> bool:
        """It has a slot, and a token that no step has computed or is computing."""
        return self.slot >= 0 and self.computed_tokens < len(self.tokens)

    @property
    def full(self) -> bool:
        """No further token is wanted or fits."""
        return len(self.tokens) >= self.limit_tokens

    @property
    def reserve_tokens(self) -> int:
        """KV room to reserve for it."""
        return reserve_tokens(
            self.profile,
            prompt_tokens=self.prompt_tokens,
            known_tokens=len(self.tokens),
            limit_tokens=self.limit_tokens,
        )

    def seat(self, slot: int, cached_tokens: int) -> None:
        """Give it a slot; what the slot does not hold is to be prefilled."""
        self.slot, self.computed_tokens, self.proven = slot, cached_tokens, False
        self.prefill_tokens = len(self.tokens)

    def unseat(self) -> None:
        """Take its slot and what was computed in it."""
        self.slot, self.computed_tokens, self.prefill_tokens = -1, 0, 0
        self.preemptions += 1
        self._waiting_view = None

    def reach(self, first: int, count: int) -> int:
        """Tokens were computed; returns how many of them had been before."""
        again = min(first + count, self.reached_tokens) - first
        self.reached_tokens = max(self.reached_tokens, first + count)
        return max(again, 0)

    def output(
        self,
        token_ids: tuple[int, ...] = (),
        finish: "FinishReason.ValueType" = FINISH_REASON_UNSPECIFIED,
        failure: Failure | None = None,
    ) -> SequenceOutput:
        """What the agent is told of it."""
        return SequenceOutput(
            request_id=self.request_id,
            generation=self.generation,
            token_ids=token_ids,
            finish=finish,
            failure=failure,
        )

    def take(
        self, token: int, logprobs: TokenLogprobs | None, eos_ids: Collection[int], now: float
    ) -> SequenceOutput:
        """Take in the token that was chosen.

        Args:
            token: -1 where the logits were not finite.
            logprobs: what was asked for of log probabilities.
            eos_ids: tokens that end the answer.
            now: seconds since the epoch.

        Returns:
            What the agent is told; with a reason to finish if this was the last.
        """
        self.proven = token >= 0
        if token < 0:
            failure = Failure(
                reason="LOGITS_NOT_FINITE",
                message="the model's logits are not finite; a wider dtype may help",
            )
            return self.output(finish=FINISH_REASON_FAILED, failure=failure)
        if token in eos_ids:
            return self.output(finish=FINISH_REASON_STOP)
        self.tokens.append(token)
        if self.first_token_at is None:
            self.first_token_at = now
        output = self.output((token,))
        if logprobs is not None:
            output.logprobs.append(logprobs)
        if self.full:
            output.finish = FINISH_REASON_LENGTH
        return output

    def view(self) -> SequenceView:
        """What the policy sees. Kept while it waits: nothing changes then."""
        if self._waiting_view is not None and self.slot < 0:
            return self._waiting_view
        view = SequenceView(
            request_id=self.request_id,
            slo=self.slo,
            profile=self.profile,
            prompt_tokens=self.prefill_tokens or len(self.tokens),
            computed_tokens=self.computed_tokens,
            output_tokens=len(self.tokens) - self.given_tokens,
            max_output_tokens=self.limit_tokens - self.given_tokens,
            reserve_tokens=self.reserve_tokens,
            rank=self.rank,
            arrived_at=self.arrived_at,
            preemptions=self.preemptions,
            first_token_at=self.first_token_at,
            tenant=self.tenant,
        )
        if self.slot < 0:
            self._waiting_view = view
        return view


def _check(
    command: AddSequence, capacity: Capacity, vocabulary: Vocabulary, adapters: Collection[str]
) -> None:
    """Raise SequenceError for what this engine cannot serve."""
    room = min(capacity.max_tokens, capacity.kv_tokens)
    sampling = command.sampling
    if command.adapter and command.adapter not in adapters:
        known = f"one of {', '.join(sorted(adapters))}, or" if adapters else "ask"
        raise SequenceError(
            "ADAPTER_NOT_FOUND",
            f"adapter {command.adapter!r} is not loaded here; {known} without an adapter",
        )
    if not 0 < command.prompt_tokens <= len(command.token_ids):
        raise SequenceError(
            "PROMPT_INVALID",
            f"{command.prompt_tokens} prompt tokens of {len(command.token_ids)} given: "
            "at least one, at most all",
        )
    if max(command.token_ids) >= vocabulary.size:
        raise SequenceError(
            "TOKEN_OUT_OF_VOCABULARY",
            f"token {max(command.token_ids)} with a vocabulary of {vocabulary.size}; "
            "tokenize with the model's own tokenizer",
        )
    if len(command.token_ids) > room:
        raise SequenceError(
            "CONTEXT_EXCEEDED",
            f"{len(command.token_ids)} tokens, and the context holds {room}; shorten the prompt",
        )
    if not sampling.temperature >= 0:
        raise SequenceError("SAMPLING_INVALID", f"temperature {sampling.temperature}: 0 or more")
    if sampling.HasField("top_p") and not 0 < sampling.top_p <= 1:
        raise SequenceError("SAMPLING_INVALID", f"top_p {sampling.top_p}: above 0, at most 1")


def _slo(command: AddSequence) -> Slo:
    """The command's SLO."""
    try:
        return slo_from_proto(command.slo, command.accepted_seconds)
    except ValueError as error:
        raise SequenceError("SLO_INVALID", f"slo: {error}") from error


def _profile(command: AddSequence, limit_tokens: int) -> ResourceProfile:
    """The command's profile; without one, the longest answer is expected."""
    if command.profile.output_tokens.levels:
        try:
            return profile_from_proto(command.profile)
        except ValueError as error:
            raise SequenceError("PROFILE_INVALID", f"output_tokens: {error}") from error
    longest = float(max(limit_tokens - len(command.token_ids), 1))
    return ResourceProfile(
        prompt_tokens=command.prompt_tokens, output_tokens=QuantileFunction((0.5,), (longest,))
    )


def sequence_from_command(
    command: AddSequence,
    capacity: Capacity,
    vocabulary: Vocabulary,
    arrived_at: float,
    adapters: Collection[str] = (),
) -> Sequence:
    """The sequence that a command asks for.

    Raises:
        SequenceError: if it cannot be served here.
    """
    _check(command, capacity, vocabulary, adapters)
    limit = min(capacity.max_tokens, capacity.kv_tokens)
    if command.sampling.HasField("max_tokens"):
        limit = min(limit, command.prompt_tokens + command.sampling.max_tokens)
    given = len(command.token_ids)
    return Sequence(
        request_id=command.request_id,
        generation=command.generation,
        tokens=list(command.token_ids),
        prompt_tokens=command.prompt_tokens,
        given_tokens=given,
        limit_tokens=limit,
        sampling=command.sampling,
        slo=_slo(command),
        profile=_profile(command, limit),
        rank=command.rank,
        arrived_at=arrived_at,
        adapter=command.adapter,
        tenant=command.tenant,
        refusable=command.refusable,
    )
