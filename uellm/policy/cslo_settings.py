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


@dataclass(frozen=True)
class CsloOdbsSettings(CsloSettings):
    """Settings of continuous SLO-ODBS in the engine."""

    knee_factor: float = setting(
        1.0,
        "Most sequences at once, in knees: batches from which on arithmetic, not the weights, "
        "sets the pace. 0: as many as there are slots.",
        least=0,
    )
    kv_share: float = setting(
        0.98, "Share of the KV room that the predicted peak may take.", above=0, most=1
    )
    urgent_knee_factor: float = setting(
        2.0,
        "With the urgent, in knees, as far as who decodes can still be in time: beyond one all are "
        "slower, but nothing is computed twice. 0: as many as there are slots.",
        least=0,
    )
    urgent_steps: float = setting(
        60.0, "A request is urgent when it has to start within so many steps.", least=0
    )
    foresight: float = setting(
        0.6,
        "For how long a request can wait, lengths are taken so far from their median to their 90 % "
        "quantile.",
        least=0,
        most=1,
    )
    overload_weight: float = setting(
        3.0,
        "w2 besides, times the share of those that wait that is lost: where not all can be in "
        "time, more are if the short go first.",
        least=0,
    )
    lent_steps: int = setting(
        8,
        "The urgent are let in beyond the predicted peak where there is room for so many steps: "
        "whoever has time is preempted only if room really runs out.",
        least=0,
    )
    recompute_factor: float = setting(
        2.0,
        "Computing anew who is preempted may take so many times what an urgent one takes of the "
        "engine.",
        least=0,
    )
    dear_recompute_factor: float = setting(
        0.25,
        "The same where arithmetic sets the pace: computing anew then takes time from all, who is "
        "preempted for being lost included.",
        least=0,
    )
    most_preemptions: int = setting(
        3, "Who was preempted so often is not preempted for an urgent one. 0: nobody is.", least=0
    )
    min_chunk_tokens: int = setting(
        32, "A step prefills so many tokens, however short of time the running are.", least=1
    )
    keep_up: float = setting(
        2.0,
        "And so many times as many as keep up with the answers that end: with less, those that "
        "wait for their first token pay for those that decode.",
        least=0,
    )
    scanned: int = setting(
        0,
        "So many first of the order are judged by whether they are in time together; at most 256.",
        least=0,
        most=256,
    )
