"""How fast batches follow each other through stages while prompts come in between. Pure.

All batches in flight go round: each computes one step, behind one another on every stage, since a
stage takes steps in order. In most rounds all steps are short. A sequence that is over makes room
for another, whose prompt makes one step long: what is behind it waits on every stage in turn, and
stages that had time to spare lose it. So a round takes as long as its busiest stage does, or as its
longest step takes from the first stage to the last and back (critical circuits of an event graph;
Baccelli, Cohen, Olsder and Quadrat, "Synchronization and Linearity", 1992, 2.4).
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stations:
    """What steps take, in seconds.

    Attributes:
        prefill: of each stage for a batch's prompts.
        decode: of each stage for a step that decodes.
        first: latency of a batch's prompts, ways and the way back included.
        next: latency of a step that decodes, likewise.
    """

    prefill: Sequence[float]
    decode: Sequence[float]
    first: float
    next: float


def steady_seconds(stations: Stations, sequences: int, in_flight: int, output_tokens: int) -> float:
    """Mean seconds between the ends of two batches, if sequences end at different times.

    Args:
        stations: of a replica.
        sequences: in a batch.
        in_flight: batches under way at once.
        output_tokens: of each sequence.
    """
    # Prompts come one at a time while there are more rounds than prompts, else several in each.
    prompts = in_flight * sequences
    rounds = min(prompts, output_tokens)
    each = prompts / rounds
    longer = [(p - d) / sequences for p, d in zip(stations.prefill, stations.decode, strict=True)]
    further = (stations.first - stations.next) / sequences * max(each / in_flight, 1.0)
    short = max(in_flight * max(stations.decode), stations.next)
    long = max(
        *(in_flight * d + each * more for d, more in zip(stations.decode, longer, strict=True)),
        stations.next + further,
    )
    return (rounds * long + (output_tokens - rounds) * short) / in_flight
