"""Continuous SLO-ODBS in the engine: the paper's idea, decided before every step.

Who cannot be in time yields to who can; the urgent take slots from those that have time; as many
run as pay, by the KV room that they will come to take. With static execution and a threshold it
would be SLO-ODBS again (``uellm.policy.static``).
"""

from dataclasses import dataclass

from uellm.policy.continuous import batch_cap
from uellm.policy.fairness import Turn, in_turns
from uellm.policy.latency import DEFAULT_COST
from uellm.policy.latest_start import Outlook, Pace, outlook, pace_of
from uellm.policy.occupancy import victims
from uellm.policy.pacing import paced_chunk
from uellm.policy.peak import PeakRoom
from uellm.policy.selection import Fluid, Job, late_ones
from uellm.policy.settings import PolicySettings, setting
from uellm.policy.views import EngineView, StepDecision


@dataclass(frozen=True)
class CsloOdbsSettings(PolicySettings):
    """Settings of continuous SLO-ODBS in the engine."""

    slo_weight: float = setting(1.0, "w1, of the seconds until a request is due.", least=0)
    length_weight: float = setting(0.0, "w2, of the seconds that its answer takes.", least=0)
    knee_factor: float = setting(
        1.0,
        "Most sequences at once, in knees: batches from which on arithmetic, not the weights, "
        "sets the pace. 0: as many as there are slots.",
        least=0,
    )
    kv_share: float = setting(
        0.98, "Share of the KV room that the predicted peak may take.", above=0, most=1
    )
    caution: float = setting(
        0.5,
        "For the peak, lengths are taken so far from their median to their 90 % quantile.",
        least=0,
        most=1,
    )
    most_misfits: int = setting(4, "So many that do not fit are passed over.", least=0)
    urgent_steps: float = setting(
        30.0, "A request is urgent when it has to start within so many steps.", least=0
    )
    most_preemptions: int = setting(
        3, "Who was preempted so often is not preempted for an urgent one. 0: nobody is.", least=0
    )
    min_chunk_tokens: int = setting(
        32, "A step prefills so many tokens, however short of time the running are.", least=1
    )
    scanned: int = setting(
        256, "So many first of the order are judged by whether they are in time together.", least=1
    )
    max_wait_seconds: float = setting(
        600.0, "Who has waited longer than this has a claim on a slot.", above=0
    )
    elder_every: int = setting(
        8, "One in so many slots is for those that have waited too long.", least=1
    )


@dataclass(slots=True)
class _Standing:
    """Who runs, as the decision changes it."""

    running: list[Outlook]
    room: PeakRoom
    places: int
    elders: int


class CsloOdbsStep:
    """Continuous SLO-ODBS; see docs/scheduling.md for what each part is worth."""

    name = "cslo-odbs"
    settings_type = CsloOdbsSettings

    def __init__(self, settings: CsloOdbsSettings | None = None) -> None:
        self._settings = settings or CsloOdbsSettings()

    def step(self, engine: EngineView, now: float) -> StepDecision:
        """See ``uellm.policy.views.StepPolicy``."""
        settings = self._settings
        pace = pace_of(engine, engine.cost or DEFAULT_COST)
        running = [
            outlook(s, pace, now, engine.block_tokens, settings.caution) for s in engine.running
        ]
        chunk = paced_chunk(running, engine, pace, settings.min_chunk_tokens, now)
        again = now + settings.urgent_steps * pace.step / 2 if engine.waiting else None
        if preempt := self._out_of_room(engine, running, now):
            return StepDecision(preempt=preempt, chunk_tokens=chunk, reconsider_at=again)
        if not engine.waiting:
            return StepDecision(chunk_tokens=chunk)
        waiting = [
            outlook(s, pace, now, engine.block_tokens, settings.caution) for s in engine.waiting
        ]
        cap = batch_cap(engine.slots, engine.cost, settings.knee_factor)
        standing = _Standing(
            running,
            PeakRoom(
                min(settings.kv_share * engine.kv_tokens_total, engine.kv_tokens_total),
                [o.held for o in running],
                [o.cautious for o in running],
            ),
            cap - len(running),
            sum(self._overdue(o, now) for o in running),
        )
        order, hopeful = self._order(waiting, engine, standing, cap, pace, now)
        admit, preempt = self._admit(order, hopeful, standing, cap, pace, now)
        return StepDecision(
            admit=tuple(o.sequence.request_id for o in admit),
            preempt=preempt,
            chunk_tokens=chunk,
            reconsider_at=again if len(admit) < len(waiting) else None,
            reserve={
                o.sequence.request_id: max(o.sequence.prompt_tokens, o.sequence.computed_tokens) + 1
                for o in admit
            },
        )

    def _overdue(self, outlook: Outlook, now: float) -> bool:
        return now - outlook.sequence.slo.accepted_at > self._settings.max_wait_seconds

    def _out_of_room(
        self, engine: EngineView, running: list[Outlook], now: float
    ) -> tuple[str, ...]:
        """Whom to preempt for want of room: those that are lost, then who can wait longest."""
        by_id = {o.sequence.request_id: o for o in running}

        def key(sequence: object) -> tuple[float, ...]:
            found = by_id[sequence.request_id]  # type: ignore[attr-defined]
            return (self._overdue(found, now), not found.lost, -found.latest_start)

        return victims(engine, key)

    # ---- order ---------------------------------------------------------------------------------

    def _order(
        self,
        waiting: list[Outlook],
        engine: EngineView,
        standing: _Standing,
        cap: int,
        pace: Pace,
        now: float,
    ) -> tuple[list[Outlook], int]:
        """Who waits, first to go first, and how many of them can be in time."""
        settings = self._settings

        def key(o: Outlook) -> tuple[float, float, int]:
            score = (
                settings.slo_weight * (o.due - now) + settings.length_weight * o.median * pace.step
            )
            return (score, o.sequence.arrived_at, o.sequence.rank)

        able = sorted((o for o in waiting if not o.lost), key=key)
        lost = [o for o in waiting if o.lost]
        lost.sort(key=lambda o: (o.sequence.slo.accepted_at, o.sequence.arrived_at))
        turns = in_turns(
            [
                Turn(
                    o.sequence.tenant,
                    o.sequence.slo.priority,
                    o.sequence.prompt_tokens + o.median,
                    o.due - now,
                )
                for o in able
            ],
            ((s.tenant, s.slo.priority, s.prompt_tokens + s.output_tokens) for s in engine.running),
            pace.step,
        )
        able = [able[place] for place in turns]
        late = self._late(able[: settings.scanned], engine, standing, cap, pace, now)
        in_time = [o for place, o in enumerate(able) if place not in late]
        order = [*in_time, *(able[place] for place in sorted(late)), *lost]
        elders = [o for o in waiting if self._overdue(o, now)]
        if elders and standing.elders < max(1, cap // settings.elder_every):
            elder = min(elders, key=lambda o: (o.sequence.slo.accepted_at, o.sequence.arrived_at))
            hopeful = len(in_time) + (elder not in in_time)
            return [elder, *(o for o in order if o is not elder)], hopeful
        return order, len(in_time)

    def _late(
        self,
        able: list[Outlook],
        engine: EngineView,
        standing: _Standing,
        cap: int,
        pace: Pace,
        now: float,
    ) -> set[int]:
        held = sum(o.held for o in standing.running)
        free = self._settings.kv_share * engine.kv_tokens_total - held
        jobs = (
            Job(
                latest_start=o.last_chance,
                slot_seconds=o.prefill + o.median * pace.step,
                kv_token_seconds=(o.held + o.median / 2) * o.median * pace.step,
                prefill_seconds=o.prefill,
                kv_tokens=o.held + o.median,
            )
            for o in able
        )
        fluid = Fluid(cap, self._settings.kv_share * engine.kv_tokens_total, standing.places, free)
        return late_ones(jobs, fluid, now)

    # ---- admission -----------------------------------------------------------------------------

    def _admit(
        self,
        order: list[Outlook],
        hopeful: int,
        standing: _Standing,
        cap: int,
        pace: Pace,
        now: float,
    ) -> tuple[list[Outlook], tuple[str, ...]]:
        settings = self._settings
        admitted: list[Outlook] = []
        preempted: list[Outlook] = []
        misfits = 0
        for place, each in enumerate(order):
            elder = place == 0 and self._overdue(each, now)
            if standing.places > 0 and standing.room.fits(each.held, each.cautious):
                gone: list[Outlook] | None = []
            elif (
                place < hopeful
                and not elder
                and each.latest_start - now < settings.urgent_steps * pace.step
            ):
                gone = self._cleared(each, standing, pace, now)
            else:
                gone = None
            if gone is None:
                misfits += 1
                # Whoever has waited too long goes before all others, as soon as there is room.
                if elder or misfits > settings.most_misfits:
                    break
                continue
            preempted += gone
            standing.places += len(gone) - 1
            standing.room.add(each.held, each.cautious)
            admitted.append(each)
        return admitted, tuple(o.sequence.request_id for o in preempted)

    def _cleared(
        self, urgent: Outlook, standing: _Standing, pace: Pace, now: float
    ) -> list[Outlook] | None:
        """Whom to preempt so that an urgent one fits; None if that is not worth its price."""
        need = urgent.prefill + urgent.median * pace.step
        candidates = [o for o in standing.running if self._yields(o, need, standing, pace, now)]
        candidates.sort(key=lambda o: (not o.lost, o.held if o.lost else -o.latest_start))
        gone: list[Outlook] = []
        for victim in candidates[:_MOST_VICTIMS]:
            gone.append(victim)
            standing.room.remove(victim.held, victim.cautious)
            places = standing.places + len(gone)
            if places > 0 and standing.room.fits(urgent.held, urgent.cautious):
                standing.running = [o for o in standing.running if o not in gone]
                return gone
        for victim in gone:
            standing.room.add(victim.held, victim.cautious)
        return None

    def _yields(
        self, victim: Outlook, need: float, standing: _Standing, pace: Pace, now: float
    ) -> bool:
        """Whether a running sequence may give way to one that takes ``need`` seconds."""
        if victim.sequence.preemptions >= self._settings.most_preemptions:
            return False
        if self._overdue(victim, now):
            return False
        if victim.lost:
            return True
        again = victim.prefill
        slack = victim.latest_start - now
        return (
            slack > 1.5 * need + 5 * again + self._settings.urgent_steps * pace.step
            and again <= need / len(standing.running)
        )


_MOST_VICTIMS = 3
"""For one urgent request."""
