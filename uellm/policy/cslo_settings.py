"""What continuous SLO-ODBS is told at both levels."""

from dataclasses import dataclass

from uellm.core.settings import Settings, setting


@dataclass(frozen=True)
class CsloSettings(Settings):
    """Settings that the scheduler's half and the engine's half have in common."""

    slo_weight: float = setting(1.0, "w1: weight of the seconds until a request is due.", least=0)
    length_weight: float = setting(0.0, "w2: weight of the seconds that its answer takes.", least=0)
    caution: float = setting(
        0.15,
        "Lengths that the KV peak is predicted with: 0: their medians, 1: their 90 % quantiles. "
        "Low, since long and short answers make up for each other, and empty KV room costs more "
        "than preempting now and then.",
        least=0,
        most=1,
    )
    most_misfits: int = setting(
        4,
        "Most waiting requests that are skipped because they do not fit, for later ones.",
        least=0,
    )
    max_wait_seconds: float = setting(
        600.0, "A request that has waited longer has a claim on a slot (see elder_every).", above=0
    )
    elder_every: int = setting(
        16, "One in this many slots is kept for those beyond max_wait_seconds.", least=1
    )


@dataclass(frozen=True)
class CsloOdbsSettings(CsloSettings):
    """Settings of continuous SLO-ODBS in the engine."""

    knee_factor: float = setting(
        1.0,
        "Most sequences at once, in multiples of the knee: the batch from which on arithmetic, not "
        "reading the weights, sets the pace. 0: as many as there are slots.",
        least=0,
    )
    kv_share: float = setting(
        0.98, "Share of the KV room that the predicted peak may take.", above=0, most=1
    )
    urgent_knee_factor: float = setting(
        2.0,
        "The same where urgent ones wait, as long as those that decode stay in time: above 1 all "
        "are slower, but nobody has to be preempted. 0: as many as there are slots.",
        least=0,
    )
    urgent_steps: float = setting(
        60.0, "A request is urgent when it has to start within this many steps.", least=0
    )
    foresight: float = setting(
        0.6,
        "Lengths that the latest start of a request is computed with: 0: its median, 1: its 90 % "
        "quantile.",
        least=0,
        most=1,
    )
    overload_weight: float = setting(
        3.0,
        "Added to w2, times the share of those waiting that cannot be in time any more: under "
        "overload more are in time if the short go first.",
        least=0,
    )
    lent_steps: int = setting(
        8,
        "Urgent ones are admitted beyond the predicted KV peak where there is room for this many "
        "steps; others are preempted only if room does run out.",
        least=0,
    )
    recompute_factor: float = setting(
        2.0,
        "For an urgent one somebody is preempted whose recomputation takes at most this many times "
        "what the urgent one takes of the engine.",
        least=0,
    )
    dear_recompute_factor: float = setting(
        0.25,
        "The same where arithmetic sets the pace, since recomputing then takes time from all; "
        "holds for preempting the lost, too.",
        least=0,
    )
    most_preemptions: int = setting(
        3, "How often a sequence may be preempted for urgent ones. 0: never.", least=0
    )
    min_chunk_tokens: int = setting(
        32, "Prompt tokens that a step computes, however tight those are that decode.", least=1
    )
    keep_up: float = setting(
        2.0,
        "The same as a multiple of the prompt tokens that replace the answers that end; with less, "
        "those that wait for their first token pay for those that decode.",
        least=0,
    )
    scanned: int = setting(
        0,
        "Of how many, the first of the order, it is found out who can be in time together; 0: of "
        "none; at most 256.",
        least=0,
        most=256,
    )
