"""What continuous SLO-ODBS is told at both levels."""

from dataclasses import dataclass

from uellm.core.settings import Settings, setting


@dataclass(frozen=True)
class CsloSettings(Settings):
    """Settings that the scheduler's half and the engine's half have in common."""

    slo_weight: float = setting(1.0, "w1, of the seconds until a request is due.", least=0)
    length_weight: float = setting(0.0, "w2, of the seconds that its answer takes.", least=0)
    caution: float = setting(
        0.15,
        "For the peak, lengths are taken so far from their median to their 90 % quantile. Long "
        "and short ones make up for each other, and room that stays empty costs more than who "
        "is preempted now and then.",
        least=0,
        most=1,
    )
    most_misfits: int = setting(4, "So many that do not fit are passed over.", least=0)
    max_wait_seconds: float = setting(
        600.0, "Who has waited longer than this has a claim on a slot.", above=0
    )
    elder_every: int = setting(
        16, "One in so many slots is for those that have waited too long.", least=1
    )
