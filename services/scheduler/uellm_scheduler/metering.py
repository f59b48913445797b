"""How much is asked of a model and how well it is answered, over a window of time. No I/O."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from uellm.convert import verdict
from uellm.core.load import OfferedLoad
from uellm.core.request import Slo
from uellm.policy.views import QueuedView
from uellm.v1 import common_pb2, queue_pb2
from uellm_scheduler.keeping import ANSWERED

LENGTHS_KEPT = 2048
"""Of so many of the latest requests, lengths are looked at."""
_LEAST_SECONDS = 1.0
# A distribution stands for itself by these quantiles, each as likely as the others.
_QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
_LATE = frozenset({common_pb2.FINISH_REASON_EXPIRED, common_pb2.FINISH_REASON_REFUSED})


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that ended.

    Attributes:
        event: what became of it.
        slo: what it had asked for; None: not known any more.
    """

    event: queue_pb2.CompletionEvent
    slo: Slo | None


class Meter:
    """Counts what comes and ends; times are seconds since the epoch by Redis TIME.

    Args:
        window_seconds: how far back it looks.
    """

    def __init__(self, window_seconds: float) -> None:
        self._window = window_seconds
        self._began: float | None = None
        self._arrivals: deque[float] = deque()
        self._lengths: deque[tuple[float, int, tuple[float, ...], float]] = deque(
            maxlen=LENGTHS_KEPT
        )
        self._turned_away: deque[tuple[float, int]] = deque()
        self._answers: deque[float] = deque()
        self._verdicts: deque[tuple[float, bool]] = deque()
        self._samples: deque[tuple[float, bool]] = deque()

    def arrived(self, views: Iterable[QueuedView]) -> None:
        """Requests were accepted; those from before the latest one are known already."""
        new: deque[QueuedView] = deque(maxlen=LENGTHS_KEPT)
        for view in views:
            at = view.slo.accepted_at
            if view.attempt or (self._arrivals and at < self._arrivals[-1]):
                continue
            self._arrivals.append(at)
            new.append(view)
        for view in new:
            lengths = view.profile.output_tokens
            points = tuple(lengths.at(level) for level in _QUANTILES)
            self._lengths.append(
                (view.slo.accepted_at, view.profile.prompt_tokens, points, lengths.mean)
            )

    def turned_away(self, counts: Iterable[tuple[float, int]]) -> None:
        """So many more were refused by gateways before they were accepted, by when that was said.

        Below 0: so many of them came again and were accepted.
        """
        self._turned_away.extend(counts)

    def ended(self, requests: Iterable[Ended]) -> None:
        """Requests ended. One that was cancelled, or failed, says nothing of the load."""
        for each in requests:
            event, slo = each.event, each.slo
            at = event.finished_ms / 1000
            if event.finish_reason in _LATE:
                self._verdicts.append((at, False))
            if event.finish_reason not in ANSWERED:
                continue
            self._answers.append(at)
            if slo is None or {slo.deadline_at, slo.ttft_at, slo.tpot_seconds} == {None}:
                continue
            first = event.first_token_ms / 1000 if event.first_token_ms else None
            self._verdicts.append((at, verdict(slo, first, at, event.output_tokens).met))

    def sample(self, now: float, *, waits: bool) -> None:
        """Look at the queue; ``waits``: somebody does whom no replica has room for."""
        self._began = now if self._began is None else self._began
        self._samples.append((now, waits))

    def load(self, now: float, waiting: int) -> OfferedLoad:
        """The load of the window that ends now.

        Args:
            now: the present.
            waiting: requests that wait.
        """
        since = now - self._window
        for times in (self._arrivals, self._answers):
            while times and times[0] <= since:
                times.popleft()
        for marked in (self._lengths, self._verdicts, self._samples, self._turned_away):
            while marked and marked[0][0] <= since:
                marked.popleft()
        seen = [*self._arrivals, *(at for at, _ in self._turned_away)]
        known_for = now - min([*seen, now if self._began is None else self._began])
        seconds = min(self._window, max(known_for, _LEAST_SECONDS))
        prompts = [prompt for _, prompt, _, _ in self._lengths]
        points = [point for _, _, found, _ in self._lengths for point in found]
        turned_away = max(0, sum(count for _, count in self._turned_away))
        samples = [waits for _, waits in self._samples]
        return OfferedLoad(
            measured_at=now,
            window_seconds=seconds,
            requests_per_second=(len(self._arrivals) + turned_away) / seconds,
            answered_per_second=len(self._answers) / seconds,
            prompt_tokens=float(np.mean(prompts)) if prompts else 0.0,
            prompt_tokens_p90=round(float(np.quantile(prompts, 0.9))) if prompts else 0,
            output_tokens=float(np.mean([each[3] for each in self._lengths])) if prompts else 0.0,
            output_tokens_p90=round(float(np.quantile(points, 0.9))) if prompts else 0,
            judged=len(self._verdicts),
            kept=sum(kept for _, kept in self._verdicts),
            waiting=waiting,
            waited_share=sum(samples) / len(samples) if samples else 0.0,
            turned_away_per_second=turned_away / seconds,
        )
