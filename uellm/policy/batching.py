"""Batches for static execution: a batch starts together, padded, and runs to its longest answer.

The batchers of the paper (UELLM, arXiv 2409.14961, section III-B) and those that it is compared
with. They see candidates, not requests: the scheduler, the engine and the simulator share them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from uellm.core.settings import Settings, setting


@dataclass(frozen=True, slots=True)
class Candidate:
    """A request that may be batched.

    Attributes:
        request_id: its id.
        arrived_at: when it came, in seconds.
        slo_seconds: time allowed for its whole answer, from its arrival.
        output_tokens: predicted length of its answer.
        kv_tokens: KV room that it will probably not exceed.
        prompt_tokens: length of its prompt.
        retries: how often its prediction was exceeded so far that it had to begin again.
    """

    request_id: str
    arrived_at: float
    slo_seconds: float
    output_tokens: float
    kv_tokens: float
    prompt_tokens: int = 0
    retries: int = 0


@dataclass(frozen=True, slots=True)
class Room:
    """What one batch may take.

    Attributes:
        slots: most requests at once.
        kv_tokens: KV room; 0 if it is not known.
    """

    slots: int
    kv_tokens: float = 0

    def holds(self, count: int, kv_tokens: float) -> bool:
        """So many requests fit, that take so much together; one alone always does."""
        return count <= max(self.slots, 1) and (
            count == 1 or not self.kv_tokens or kv_tokens <= self.kv_tokens
        )


Batch = list[Candidate]
Batcher = Callable[[Sequence[Candidate], Room], list[Batch]]
"""Parts candidates into batches, the first to run first. Independent of the candidates' order."""


@dataclass(frozen=True)
class OdbsSettings(Settings):
    """Settings of SLO-ODBS and its two halves.

    The paper gives no values. The weights and the threshold are those of the authors' code, the
    overheads its factor; seconds and tokens are added up as they are.
    """

    slo_weight: float = setting(1.0, "w1, of SLOs in seconds.", least=0)
    length_weight: float = setting(0.5, "w2, of predicted lengths in tokens.", least=0)
    slo_overhead: float = setting(
        1.2, "L1, by which one more request in parallel prolongs the others.", least=0
    )
    length_overhead: float = setting(1.2, "L2, the same for lengths.", least=0)
    threshold: float = setting(15_000.0, "Most that w1 T_l + w2 T_o of a batch may be.", least=0)
    most_requests: int = setting(10, "Most requests of a batch.", least=1)


def slo_odbs(candidates: Sequence[Candidate], room: Room, settings: OdbsSettings) -> list[Batch]:
    """SLO-ODBS (paper, algorithm 1): in the order of w1 SLO + w2 length, as long as costs allow.

    The next candidate joins while ``w1 T_l + w2 T_o <= threshold``, with

        T_l = sum_i (SLO_i    + L_CM) * (|batch| + 1) * L1
        T_o = sum_i (length_i + O_CM) * (|batch| + 1) * L2

    i runs over the batch and the candidate, |batch| does not count it, and L_CM and O_CM are the
    largest SLO and length of the batch so far, 0 of an empty one. (The paper says "latency" of
    L_CM; what is known of a latency before it is there is what it may be.) w1 = 0 is ODBS, and
    w2 = 0 is SLO-DBS. A candidate whose cost alone is above the threshold is a batch of its own.
    """

    def joins(batch: Batch, candidate: Candidate) -> bool:
        cost = odbs_cost([*batch, candidate], settings)
        return len(batch) < settings.most_requests and cost <= settings.threshold

    return _grown(_by_score(candidates, settings), room, joins)


def _by_score(candidates: Sequence[Candidate], settings: OdbsSettings) -> Batch:
    def key(candidate: Candidate) -> tuple[float, float, str]:
        score = (
            settings.slo_weight * candidate.slo_seconds
            + settings.length_weight * candidate.output_tokens
        )
        return (score, candidate.arrived_at, candidate.request_id)

    return sorted(candidates, key=key)


def odbs_cost(batch: Sequence[Candidate], settings: OdbsSettings) -> float:
    """w1 T_l + w2 T_o of a batch whose last member is the candidate."""
    before, parallel = batch[:-1], len(batch)
    largest_slo = max((c.slo_seconds for c in before), default=0.0)
    longest = max((c.output_tokens for c in before), default=0.0)
    latency = sum(c.slo_seconds + largest_slo for c in batch) * parallel * settings.slo_overhead
    output = sum(c.output_tokens + longest for c in batch) * parallel * settings.length_overhead
    return settings.slo_weight * latency + settings.length_weight * output


def coded_slo_odbs(
    candidates: Sequence[Candidate], room: Room, settings: OdbsSettings
) -> list[Batch]:
    """SLO-ODBS as the authors' code has it (HYIUYOU/UELLM).

    In the order of ``w1 SLO + w2 length``, a candidate joins n others while n is less than the
    most and ``(length - longest) * (n + 1) * 1.2 <= threshold``: only by how much it would
    prolong the batch counts.
    """

    def joins(batch: Batch, candidate: Candidate) -> bool:
        longer = candidate.output_tokens - max(c.output_tokens for c in batch)
        cost = longer * (len(batch) + 1) * settings.length_overhead
        return len(batch) < settings.most_requests and cost <= settings.threshold

    return _grown(_by_score(candidates, settings), room, joins)


def fifo(candidates: Sequence[Candidate], room: Room, most_requests: int) -> list[Batch]:
    """Batches in the order of arrival, of at most so many requests."""
    ordered = sorted(candidates, key=lambda c: (c.arrived_at, c.request_id))
    return _grown(ordered, room, lambda batch, _: len(batch) < most_requests)


def s3(candidates: Sequence[Candidate], room: Room, least_bin: int) -> list[Batch]:
    """S3's batches (Jin et al., "S3: Increasing GPU Utilization during Generative Inference").

    A predicted length stands for its bin: the next power of two, from ``least_bin`` on, and twice
    that for each time it proved too short. Longest bins first, each request goes to the first
    batch whose KV room holds its prompt and its bin (first fit decreasing), so that batches are of
    alike lengths. The batch with the oldest request runs first.
    """

    def bin_of(candidate: Candidate) -> int:
        size = least_bin
        while size < candidate.output_tokens:
            size *= 2
        return size << min(candidate.retries, 16)

    keyed = [(bin_of(candidate), candidate) for candidate in candidates]
    keyed.sort(key=lambda each: (-each[0], each[1].arrived_at, each[1].request_id))
    batches: list[Batch] = []
    taken: list[float] = []
    for size, candidate in keyed:
        need = candidate.prompt_tokens + size
        for number, batch in enumerate(batches):
            if room.holds(len(batch) + 1, taken[number] + need):
                batch.append(candidate)
                taken[number] += need
                break
        else:
            batches.append([candidate])
            taken.append(need)
    return sorted(batches, key=lambda b: min((c.arrived_at, c.request_id) for c in b))


def overdue_first(batches: list[Batch], now: float, most_seconds: float) -> list[Batch]:
    """The batch of the request that has waited longest runs first once that is too long."""
    if not batches:
        return batches
    oldest = min(batches, key=lambda b: min((c.arrived_at, c.request_id) for c in b))
    if now - min(c.arrived_at for c in oldest) <= most_seconds:
        return batches
    return [oldest, *(batch for batch in batches if batch is not oldest)]


def _grown(
    ordered: Sequence[Candidate], room: Room, joins: Callable[[Batch, Candidate], bool]
) -> list[Batch]:
    """Batches of neighbours, each as long as its next candidate joins and fits."""
    batches: list[Batch] = []
    kv_tokens = 0.0
    for candidate in ordered:
        kv_tokens += candidate.kv_tokens
        if (
            batches
            and room.holds(len(batches[-1]) + 1, kv_tokens)
            and joins(batches[-1], candidate)
        ):
            batches[-1].append(candidate)
        else:
            batches.append([candidate])
            kv_tokens = candidate.kv_tokens
    return batches
