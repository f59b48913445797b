"""When a step policy is asked: where it can answer otherwise than before.

Asking, and making up what it is asked by, may take as long as a step of a small model does. While
nobody waits, or nobody can be given a slot, nothing changes from step to step but lengths and the
time; a policy that minds them says when it wants to be asked again.
"""

from uellm.policy.views import StepDecision
from uellm_worker.engine.roster import Roster


class Occasion:
    """What happened since the policy was last asked.

    Attributes:
        decision: what it answered.
    """

    def __init__(self) -> None:
        self.decision = StepDecision()
        self._news = True
        self._arrivals = self._departures = 0

    def note(self) -> None:
        """Something happened that the roster does not show."""
        self._news = True

    def take(self, decision: StepDecision, roster: Roster) -> None:
        """The policy was asked; what it decides is yet to be carried out, and may be news."""
        self.decision, self._news = decision, False
        self._arrivals, self._departures = roster.arrivals, roster.departures

    def due(self, roster: Roster, now: float, *, admits: bool = True) -> bool:
        """Whether it is to be asked; ``admits``: a slot could be given at all."""
        again = self.decision.reconsider_at
        if again is not None and again <= now:
            return True
        if self._news or roster.arrivals != self._arrivals or _short(roster):
            return True
        if not roster.waiting and all(sequence.decoding for sequence in roster.running):
            return False
        if not admits:
            return False
        if again is None and len(roster.running) < roster.slots:
            # Room may be had by and by, as those that run get on.
            return True
        enough = self.decision.reconsider_when
        return roster.departures != self._departures and (
            enough is None or roster.kv.free_tokens >= enough
        )


def _short(roster: Roster) -> bool:
    """There may not be room for what the decodes of the next step compute."""
    several = len(roster.running) > 1
    return several and roster.kv.free_tokens < len(roster.running) * roster.kv.block_tokens
