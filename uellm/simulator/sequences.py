"""A sequence in a simulated engine: the worker's, with counts in place of tokens."""

from dataclasses import dataclass, field

from uellm.core.request import ResourceProfile, Slo
from uellm.policy.reserving import reserve_tokens
from uellm.policy.views import SequenceView


@dataclass(slots=True, eq=False)
class Sequence:
    """A sequence and how far it is.

    Attributes:
        request_id: its id.
        slo: when it is needed.
        profile: what it will need.
        prompt_tokens: of the prompt.
        given_tokens: known when it came: of the prompt, and logged before.
        end_tokens: what prompt and answer come to.
        limit_tokens: most that they may come to.
        rank: place in the scheduler's order.
        arrived_at: when it came.
        tenant: whose it is.
        tokens: known now.
        computed: tokens whose KV is in the cache.
        prefill: tokens to prefill since it was last given a slot; 0 while it waits.
        reserved: KV room reserved with its slot.
        preemptions: how often its slot was taken.
        first_token_at: when its first token here came, or None.
    """

    request_id: str
    slo: Slo
    profile: ResourceProfile
    prompt_tokens: int
    given_tokens: int
    end_tokens: int
    limit_tokens: int
    rank: int
    arrived_at: float
    tenant: str = "local"
    tokens: int = field(init=False)
    computed: int = 0
    prefill: int = 0
    reserved: int = 0
    preemptions: int = 0
    first_token_at: float | None = None
    _waiting_view: SequenceView | None = field(default=None, init=False)
    _expected: int = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = self.given_tokens
        self._expected = self._reserve_for(self.prompt_tokens)

    @property
    def seated(self) -> bool:
        """It has a slot."""
        return self.prefill > 0

    @property
    def decoding(self) -> bool:
        """Its prompt is done: each step computes the newest token."""
        return self.computed >= self.prefill

    @property
    def left(self) -> int:
        """Tokens that are still to come."""
        return self.end_tokens - self.tokens

    @property
    def reserve_tokens(self) -> int:
        """KV room to reserve for it."""
        if self.tokens < self._expected:
            return self._expected
        return self._reserve_for(self.tokens)

    def _reserve_for(self, known_tokens: int) -> int:
        return reserve_tokens(
            self.profile,
            prompt_tokens=self.prompt_tokens,
            known_tokens=known_tokens,
            limit_tokens=self.limit_tokens,
        )

    def seat(self, reserved: int) -> None:
        """Give it a slot; all of it is to be prefilled."""
        self.prefill, self.reserved = self.tokens, reserved

    def unseat(self) -> int:
        """Take its slot; returns how many computed tokens are lost."""
        lost = self.computed
        self.computed = self.prefill = self.reserved = 0
        self.preemptions += 1
        self._waiting_view = None
        return lost

    def token(self, now: float) -> None:
        """One more token came."""
        self.tokens += 1
        if self.first_token_at is None:
            self.first_token_at = now

    def view(self) -> SequenceView:
        """What the policy sees. Kept while it waits: nothing changes then."""
        if self._waiting_view is not None and not self.prefill:
            return self._waiting_view
        view = SequenceView(
            self.request_id,
            self.slo,
            self.profile,
            self.prefill or self.tokens,
            self.computed,
            self.tokens - self.given_tokens,
            self.limit_tokens - self.given_tokens,
            self.reserve_tokens,
            self.rank,
            self.arrived_at,
            self.preemptions,
            self.first_token_at,
            self.tenant,
        )
        if not self.prefill:
            self._waiting_view = view
        return view
