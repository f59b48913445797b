"""What a model's owner learns of admission, and tells its policy and its gateways."""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from uellm.policy.margin import Margin
from uellm.policy.outcomes import State
from uellm.policy.price import Price
from uellm.policy.shedding import Shedding
from uellm.policy.views import DispatchDecision, QueuedView, QueueView

REMEMBERED = 64
"""The time to try again is the mean of about so many; of so many is known what was feasible."""
MOST = 0.9
"""Of these: by the time that others are told, so many could have been answered."""


class Admissions:
    """How those fared that would rather be refused than late. Its caller tells it what happens.

    Args:
        hearing_seconds: how long after it happened something may be heard of.

    Attributes:
        margin: how much longer than forecast those may take that are let in.
        price: what they may cost.
        shedding: how many are looked at.
        retry_seconds: after which those that are not let in may try again, in the mean.
    """

    def __init__(self, hearing_seconds: float = 0.0) -> None:
        self.margin = Margin(hearing_seconds)
        self.price = Price()
        self.shedding = Shedding()
        self.retry_seconds = 1.0
        self._feasible: deque[float] = deque(maxlen=REMEMBERED)

    @property
    def feasible_seconds(self) -> float | None:
        """Within so long most of those that were not let in could have been answered.

        None: nobody was kept out yet.
        """
        return float(np.quantile(self._feasible, MOST)) if self._feasible else None

    def seen_by(self, queue: QueueView) -> QueueView:
        """A queue, with what was learnt."""
        return replace(queue, margin=self.margin.value, price=self.price.value)

    def decided(
        self,
        queue: QueueView,
        decision: DispatchDecision,
        find: Callable[[str], QueuedView | None],
        now: float,
    ) -> None:
        """A decision was made.

        Args:
            queue: of what.
            decision: which.
            find: the waiting request of an id, if it waits.
            now: when.
        """
        refused = 0
        for refusal in decision.refusals:
            retry = refusal.retry_after_seconds
            if retry is not None:
                self.retry_seconds += (retry - self.retry_seconds) / REMEMBERED
                promise = refusal.promise
                if promise is not None and promise.earliest_feasible_finish is not None:
                    self._feasible.append(promise.earliest_feasible_finish - now)
            # Whom no mesh could have served in time says nothing of the load on this one.
            overloaded = refusal.expired or retry is not None
            refused += overloaded and refusal.request_id in queue.unpromised
        easy = sum(
            (view := find(request_id)) is not None and view.refusable
            for request_id in decision.promises
            if request_id in queue.unpromised and request_id not in decision.let_in
        )
        let_in = len(decision.let_in) + easy
        self.margin.let_in(view for i in decision.let_in if (view := find(i)) is not None)
        self.price.learn(decision.let_in.values(), decision.crowded.values(), easy)
        self.shedding.learn(let_in + refused, let_in, now)

    def state(self, now: float) -> State:
        """What was learnt, for the next owner to go on from."""
        return {
            "margin": np.array(self.margin.value),
            "price": np.array([self.price.value, self.price.mean]),
            "door": np.array([self.shedding.share, now]),
        }

    def load(self, state: State) -> None:
        """Go on from what another kept, as far as it did.

        Raises:
            ValueError: if that makes no sense; what was read before that stands.
            TypeError: likewise.
        """
        if "margin" in state:
            self.margin.load(float(state["margin"]))
        if "price" in state:
            self.price.load(*map(float, state["price"]))
        if "door" in state:
            self.shedding.load(*map(float, state["door"]))

    def began(self, first_tokens: Mapping[str, float]) -> None:
        """First tokens came, by request id."""
        for request_id, at in first_tokens.items():
            self.margin.began(request_id, at)

    def finished(self, request_id: str, at: float) -> None:
        """A request's last token came."""
        self.margin.finished(request_id, at)

    def gone(self, request_id: str, *, late: bool) -> None:
        """A request ended without its answer: too late, or for another reason."""
        self.margin.gone(request_id, late=late)

    def advance(self, now: float) -> None:
        """Take note of what has not happened in time, and of newcomers that did not come."""
        self.margin.advance(now)
        self.shedding.learn(0, 0, now)
