"""Continuous SLO-ODBS in the engine: the paper's idea, decided before every step.

Who cannot be in time yields to who can; the urgent take slots from those that have time; as many
run as pay, by the KV room that they will come to take. With static execution and a threshold it
would be SLO-ODBS again (``uellm.policy.static``).
"""

from dataclasses import dataclass
from itertools import starmap
from math import ceil, inf

import numpy as np
import numpy.typing as npt

from uellm.core.cost import DEFAULT_COST
from uellm.policy.continuous import batch_cap
from uellm.policy.cslo_settings import CsloOdbsSettings
from uellm.policy.fairness import Turn, in_turns
from uellm.policy.latest_start import FactsCache, Outlook, Pace, outlook, pace_of
from uellm.policy.occupancy import held_tokens, victims
from uellm.policy.pacing import paced_chunk, paced_tokens, prefill_order
from uellm.policy.peak import PeakRoom, peak_room
from uellm.policy.rows import Floats, Places, sorted_by
from uellm.policy.running_facts import RunningFacts
from uellm.policy.selection import Fluid, Job, late_ones
from uellm.policy.views import EngineView, StepDecision


@dataclass(slots=True)
class _Standing:
    """Who runs, as the decision changes it.

    Attributes:
        running: what is expected of them.
        count: of those that have not been preempted.
        victims: their places, in the order in which they would be preempted.
        yields: which of the victims may be.
        lost: which of them are lost.
        spare: seconds that each of them can do without, beyond what computing it anew takes.
        anew: seconds that this takes.
        room: for the predicted peak.
        places: free ones.
        beyond: further ones that the urgent may have.
    """

    running: Outlook
    count: int
    victims: Places
    yields: npt.NDArray[np.bool_]
    lost: npt.NDArray[np.bool_]
    spare: Floats
    anew: Floats
    room: PeakRoom
    places: int
    beyond: int


class CsloOdbsStep:
    """Continuous SLO-ODBS; docs/scheduling.md goes through its parts."""

    name = "cslo-odbs"
    settings_type = CsloOdbsSettings

    def __init__(self, settings: CsloOdbsSettings | None = None) -> None:
        self._settings = settings or CsloOdbsSettings()
        self._waiting = FactsCache()
        self._running = RunningFacts()

    def step(self, engine: EngineView, now: float) -> StepDecision:
        """See ``uellm.policy.views.StepPolicy``."""
        settings = self._settings
        facts = self._running.of(engine.running)
        pace = pace_of(engine, facts, engine.cost or DEFAULT_COST)
        running = outlook(
            engine.running,
            facts,
            pace,
            now,
            engine.block_tokens,
            settings.caution,
            settings.foresight,
        )
        least = max(settings.min_chunk_tokens, ceil(settings.keep_up * pace.turnover))
        all_paced, most_paced = paced_tokens(running, pace, now)
        chunk = paced_chunk(running, all_paced, engine.max_chunk_tokens, pace, least)
        again = now + settings.urgent_steps * pace.step / 2 if engine.waiting else None
        if running.held.sum() > engine.kv_tokens_total and len(engine.running) > 1:
            preempt = self._out_of_room(engine, running, now)
            return StepDecision(preempt=preempt, chunk_tokens=chunk, reconsider_at=again)
        if not engine.waiting:
            return StepDecision(chunk_tokens=chunk, prefill=prefill_order(running))
        cap = batch_cap(engine.slots, engine.cost, settings.knee_factor)
        standing = self._standing(engine, running, cap, pace, most_paced, now)
        waiting = outlook(
            engine.waiting,
            self._waiting.of(engine.waiting),
            pace,
            now,
            engine.block_tokens,
            settings.caution,
            settings.foresight,
        )
        urgent = ~waiting.lost & (waiting.latest_start - now < settings.urgent_steps * pace.step)
        if standing.places <= 0 and not urgent.any():
            return StepDecision(
                chunk_tokens=chunk, prefill=prefill_order(running), reconsider_at=again
            )
        order = self._order(waiting, engine, standing, cap, pace, now)
        admit, preempt = self._admit(order, urgent, waiting, standing, pace, now)
        return StepDecision(
            admit=tuple(engine.waiting[i].request_id for i in admit),
            preempt=preempt,
            chunk_tokens=chunk,
            prefill=prefill_order(running, waiting, admit),
            reconsider_at=again if len(admit) < len(engine.waiting) else None,
            reserve={engine.waiting[i].request_id: held_tokens(engine.waiting[i]) for i in admit},
        )

    def _standing(
        self,
        engine: EngineView,
        running: Outlook,
        cap: int,
        pace: Pace,
        paced: float,
        now: float,
    ) -> _Standing:
        settings = self._settings
        most = batch_cap(engine.slots, engine.cost, settings.urgent_knee_factor)
        # Each takes a token of a step, and as much prefill as keeps up with the answers that end.
        in_time = paced / (1 + pace.turnover / max(len(engine.running), 1))
        preemptions = np.array([s.preemptions for s in engine.running])
        spare = running.latest_start - now - 5 * running.prefill
        yields = (preemptions < settings.most_preemptions) & ~self._overdue(running, now)
        # The lost, the least room first, then who can wait longest.
        by = np.where(running.lost, running.held, -running.latest_start)
        victims = np.lexsort((by, ~running.lost))
        return _Standing(
            running=running,
            count=len(engine.running),
            victims=victims,
            yields=yields[victims],
            lost=running.lost[victims],
            spare=(spare - settings.urgent_steps * pace.step)[victims],
            anew=running.prefill[victims],
            room=peak_room(
                settings.kv_share * engine.kv_tokens_total, running.held, running.cautious
            ),
            places=cap - len(engine.running),
            beyond=int(max(min(most, in_time) - cap, 0)),
        )

    def _overdue(self, those: Outlook, now: float) -> npt.NDArray[np.bool_]:
        overdue: npt.NDArray[np.bool_] = now - those.accepted > self._settings.max_wait_seconds
        return overdue

    def _out_of_room(self, engine: EngineView, running: Outlook, now: float) -> tuple[str, ...]:
        """Whom to preempt for want of room: those that are lost, then who can wait longest."""
        overdue = self._overdue(running, now)
        keys = {
            s.request_id: (float(overdue[i]), float(not running.lost[i]), -running.latest_start[i])
            for i, s in enumerate(engine.running)
        }
        return victims(engine, lambda s: keys[s.request_id])

    # ---- order ---------------------------------------------------------------------------------

    def _order(
        self,
        waiting: Outlook,
        engine: EngineView,
        standing: _Standing,
        cap: int,
        pace: Pace,
        now: float,
    ) -> Places:
        """Places of who waits, first to go first."""
        settings = self._settings
        score = settings.slo_weight * (waiting.due - now)
        weight = settings.length_weight + settings.overload_weight * waiting.lost.mean()
        score = score + weight * waiting.median * pace.step
        score[waiting.lost] = inf
        order = sorted_by((score, np.where(waiting.lost, waiting.accepted, 0.0), *waiting.arrived))
        able = len(order) - int(waiting.lost.sum())
        near, beyond, lost = np.split(order, [min(able, _NEAR), able])
        near = near[self._turns(near, waiting, engine, pace, now)]
        late = self._late(near[: settings.scanned], waiting, engine, standing, cap, pace, now)
        stays = np.ones(len(near), dtype=bool)
        stays[list(late)] = False
        order = np.concatenate([near[stays], beyond, near[~stays], lost])
        elder = self._elder(waiting, standing, now)
        if elder is not None:
            order = np.concatenate([[elder], order[order != elder]])
        return order

    def _elder(self, waiting: Outlook, standing: _Standing, now: float) -> int | None:
        """Who has waited longest, if that is too long and few such are running.

        Few beside those that do run: where KV room is short, far fewer may than there are slots.
        """
        if now - waiting.accepted.min() <= self._settings.max_wait_seconds:
            return None
        oldest = int(np.lexsort((*waiting.arrived[::-1], waiting.accepted))[0])
        overdue = int(self._overdue(standing.running, now).sum())
        return oldest if overdue < max(1, standing.count // self._settings.elder_every) else None

    def _turns(
        self, near: Places, waiting: Outlook, engine: EngineView, pace: Pace, now: float
    ) -> list[int]:
        some = [waiting.sequences[i] for i in near.tolist()]
        if len({s.tenant for s in some}) < 2:
            return list(range(len(some)))
        turns = [
            Turn(s.tenant, s.slo.priority, s.prompt_tokens + median, due - now)
            for s, median, due in zip(
                some, waiting.median[near].tolist(), waiting.due[near].tolist(), strict=True
            )
        ]
        given = (
            (s.tenant, s.slo.priority, s.prompt_tokens + s.output_tokens) for s in engine.running
        )
        return list(in_turns(turns, given, pace.step))

    def _late(
        self,
        near: Places,
        waiting: Outlook,
        engine: EngineView,
        standing: _Standing,
        cap: int,
        pace: Pace,
        now: float,
    ) -> set[int]:
        room = self._settings.kv_share * engine.kv_tokens_total
        held, median = waiting.held[near], waiting.median[near]
        seconds, prefill = median * pace.step, waiting.prefill[near]
        jobs = zip(
            waiting.last_chance[near].tolist(),
            (prefill + seconds).tolist(),
            ((held + median / 2) * seconds).tolist(),
            prefill.tolist(),
            (held + median).tolist(),
            strict=True,
        )
        free = room - float(standing.running.held.sum())
        return late_ones(starmap(Job, jobs), Fluid(cap, room, standing.places, free), now)

    # ---- admission -----------------------------------------------------------------------------

    def _admit(
        self,
        order: Places,
        urgent: npt.NDArray[np.bool_],
        waiting: Outlook,
        standing: _Standing,
        pace: Pace,
        now: float,
    ) -> tuple[list[int], tuple[str, ...]]:
        settings = self._settings
        admitted: list[int] = []
        preempted: list[int] = []
        misfits = 0
        overdue = self._overdue(waiting, now)
        any_urgent = bool(urgent.any())
        for i in order.tolist():
            if standing.places <= 0 and not any_urgent:
                break
            held, cautious = float(waiting.held[i]), float(waiting.cautious[i])
            elder = i == order[0] and overdue[i]
            gone: list[int] | None = None
            places = standing.places + (standing.beyond if urgent[i] else 0)
            if places > 0 and (
                (fuller := standing.room.beside(held, cautious)).fits
                or (urgent[i] and self._lent(held, standing, standing.room))
            ):
                gone, standing.room = [], fuller
            elif urgent[i] and not elder:
                need = float(waiting.prefill[i] + waiting.median[i] * pace.step)
                gone = self._cleared(held, cautious, need, standing, dear=pace.dear)
            if gone is None:
                misfits += 1
                # Whoever has waited too long goes before all others, as soon as there is room.
                if elder or misfits > settings.most_misfits:
                    break
                continue
            preempted += gone
            standing.places += len(gone) - 1
            admitted.append(i)
        names = standing.running.sequences
        return admitted, tuple(names[i].request_id for i in preempted)

    def _lent(self, held: float, standing: _Standing, room: PeakRoom, gone: int = 0) -> bool:
        """Whether an urgent one may have room now that others will come to need.

        There has to be somebody to give it back, by being preempted when that time comes.

        Args:
            held: KV tokens that it takes.
            standing: who runs.
            room: what they take, without those that are to be preempted for it.
            gone: how many these are.
        """
        growth = self._settings.lent_steps * (standing.count - gone + 1)
        if held + growth > room.free:
            return False
        able = standing.yields & (standing.lost | (standing.spare > 0))
        return int(able.sum()) > gone

    def _cleared(
        self,
        held: float,
        cautious: float,
        need: float,
        standing: _Standing,
        *,
        dear: bool,
    ) -> list[int] | None:
        """Whom to preempt so that an urgent one fits; None if that is not worth its price.

        Args:
            held: KV tokens that it takes.
            cautious: tokens that it will generate.
            need: seconds that it takes.
            standing: who runs; changed, with the urgent one, if somebody is preempted.
            dear: arithmetic sets the pace.
        """
        running = standing.running
        settings, share = self._settings, need / max(standing.count, 1)
        # In time, with as much again to spare, and computed anew at less than what it makes wait.
        worth = (standing.spare > 1.5 * need) & (standing.anew <= settings.recompute_factor * share)
        yields = standing.yields & (standing.lost | worth)
        if dear:
            yields &= standing.anew <= settings.dear_recompute_factor * share
        able = yields.nonzero()[0][:_MOST_VICTIMS]
        victims: list[int] = standing.victims[able].tolist()
        places, room = standing.places + standing.beyond, standing.room
        if places + len(victims) <= 0:
            return None
        for count, victim in enumerate(victims, 1):
            room = room.without(float(running.held[victim]), float(running.cautious[victim]))
            fuller = room.beside(held, cautious)
            if places + count > 0 and (fuller.fits or self._lent(held, standing, room, count)):
                standing.yields[able[:count]] = False
                standing.count -= count
                standing.room = fuller
                return victims[:count]
        return None


_NEAR = 256
"""So many first of the order take turns by tenant."""
_MOST_VICTIMS = 3
"""For one urgent request."""
