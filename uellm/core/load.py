"""What is asked of a model, and how well it is answered, over the latest past."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OfferedLoad:
    """A model's load over a window of time.

    Attributes:
        measured_at: the window's end, in seconds since the epoch by Redis TIME.
        window_seconds: its length.
        requests_per_second: that came, whether answered or not, turned away or not.
        answered_per_second: answered in full.
        prompt_tokens: of a request, mean.
        prompt_tokens_p90: likewise, 90 % quantile.
        output_tokens: of a request as predicted, mean.
        output_tokens_p90: likewise, 90 % quantile.
        judged: requests that ended and had asked for a time.
        kept: of these, those that ended in time.
        waiting: requests that wait at the window's end.
        waited_share: of the window, in which requests waited that no replica had room for.
        turned_away_per_second: of those that came, those that gateways refused unseen.
    """

    measured_at: float = 0.0
    window_seconds: float = 0.0
    requests_per_second: float = 0.0
    answered_per_second: float = 0.0
    prompt_tokens: float = 0.0
    prompt_tokens_p90: int = 0
    output_tokens: float = 0.0
    output_tokens_p90: int = 0
    judged: int = 0
    kept: int = 0
    waiting: int = 0
    waited_share: float = 0.0
    turned_away_per_second: float = 0.0

    @property
    def attainment(self) -> float:
        """Share of those that asked for a time which were in time; 1 without any."""
        return self.kept / self.judged if self.judged else 1.0
