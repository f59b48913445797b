"""Past-future: first come, first served, admitted by the predicted peak of KV room."""

from dataclasses import dataclass

from uellm.core.settings import Settings, setting
from uellm.policy.columns import Columns, Floats
from uellm.policy.continuous import batch_cap
from uellm.policy.dispatching import Dispatcher
from uellm.policy.estimate import Speed
from uellm.policy.occupancy import held_tokens, victims
from uellm.policy.peak import peak_room
from uellm.policy.peaked import peaked_room
from uellm.policy.placing import Room
from uellm.policy.remaining import remaining_tokens
from uellm.policy.views import EngineView, ReplicaView, SequenceView, StepDecision


@dataclass(frozen=True)
class PastFutureSettings(Settings):
    """Settings of past-future."""

    kv_share: float = setting(
        0.95, "Share of the KV room that the predicted peak may take.", above=0, most=1
    )
    caution: float = setting(
        0.5,
        "Lengths that the KV peak is predicted with: 0: their medians, 1: their 90 % quantiles.",
        least=0,
        most=1,
    )
    knee_factor: float = setting(
        0.0,
        "Most sequences at once, in multiples of the knee; 0: as many as there are slots.",
        least=0,
    )


class PastFutureDispatch(Dispatcher):
    """Order by arrival; a replica takes what fits its predicted peak."""

    name = "past-future"
    settings_type = PastFutureSettings

    def keys(self, columns: Columns, fastest: Speed | None, now: float) -> tuple[Floats, ...]:
        """By arrival."""
        del fastest, now
        return (columns.accepted,)

    def room(self, view: ReplicaView, now: float) -> Room:
        """By the predicted peak."""
        return peaked_room(
            view,
            self._settings,
            now,
            kv_share=self._options.kv_share,
            caution=self._options.caution,
        )


class PastFutureStep:
    """Admit by arrival as long as the predicted peak of all that run fits (Gong et al.).

    The distribution of lengths, which the paper takes from finished requests, is each request's
    predicted one, given what it has answered already.
    """

    name = "past-future"
    settings_type = PastFutureSettings

    def __init__(self, settings: PastFutureSettings | None = None) -> None:
        self._settings = settings or PastFutureSettings()

    def step(self, engine: EngineView, now: float) -> StepDecision:
        """See ``uellm.policy.views.StepPolicy``."""
        del now
        preempt = victims(engine, lambda s: (-s.arrived_at, -s.rank))
        if preempt:
            return StepDecision(preempt=preempt, chunk_tokens=engine.max_chunk_tokens)
        block, settings = engine.block_tokens, self._settings
        places = batch_cap(engine.slots, engine.cost, settings.knee_factor) - len(engine.running)
        room = peak_room(
            settings.kv_share * engine.kv_tokens_total,
            [held_tokens(s, block) for s in engine.running],
            [self._expected(s) for s in engine.running],
        )
        reserve: dict[str, int] = {}
        missing: int | None = None
        for sequence in sorted(engine.waiting, key=lambda s: (s.arrived_at, s.rank)):
            if len(reserve) >= places:
                break
            need, expected = held_tokens(sequence, block), self._expected(sequence)
            fuller = room.beside(need, expected)
            if not fuller.fits:
                missing = engine.kv_tokens_free + 1
                break
            room = fuller
            reserve[sequence.request_id] = held_tokens(sequence)
        return StepDecision(
            admit=tuple(reserve),
            chunk_tokens=engine.max_chunk_tokens,
            reconsider_when=missing,
            reserve=reserve,
        )

    def _expected(self, sequence: SequenceView) -> float:
        _, median, high = remaining_tokens(sequence)
        return median + self._settings.caution * (high - median)
