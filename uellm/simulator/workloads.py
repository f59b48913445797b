"""Synthetic workloads: lengths, objectives, arrivals.

Lengths are log-normal, given by their median and the spread of the logarithm. All that is random
is drawn in units that neither the platform nor the load changes, so that runs of one seed differ in
nothing but what they compare (common random numbers).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from uellm.core.errors import InvalidArgumentError
from uellm.core.request import Priority
from uellm.simulator.platforms import Platform
from uellm.simulator.requests import Request

MOST_TOKENS = 2048
"""Most tokens of a prompt, and of an answer."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """A log-normal length, kept within ``least`` and ``MOST_TOKENS``."""

    median: float
    spread: float
    least: int = 1

    @property
    def mean(self) -> float:
        """Of the log-normal, without its bounds."""
        return self.median * float(np.exp(self.spread**2 / 2))

    def of(self, normal: float) -> int:
        """The length at so many standard deviations."""
        length = round(self.median * float(np.exp(self.spread * normal)))
        return min(max(length, self.least), MOST_TOKENS)


@dataclass(frozen=True, slots=True)
class Objective:
    """Seconds from arrival for the answer and its first token, and per token after it; or None."""

    deadline: float | None = None
    ttft: float | None = None
    tpot: float | None = None


@dataclass(frozen=True, slots=True)
class Kind:
    """A class of requests.

    Attributes:
        name: its name.
        share: of all requests.
        prompt: length of its prompts.
        output: length of its answers.
        objective: by platform, prompt tokens, output tokens.
        priority: urgency class.
    """

    name: str
    share: float
    prompt: Lengths
    output: Lengths
    objective: Callable[[Platform, int, int], Objective]
    priority: Priority = Priority.NORMAL


def _isolated(factor: float) -> Callable[[Platform, int, int], Objective]:
    """A multiple of what the request takes alone: the objective betrays the length."""

    def objective(platform: Platform, prompt: int, output: int) -> Objective:
        alone = platform.cost.isolated(prompt, output, platform.chunk_tokens)
        return Objective(deadline=factor * alone)

    return objective


def _isolated_mean(
    factor: float, prompts: Lengths, outputs: Lengths
) -> Callable[[Platform, int, int], Objective]:
    """A multiple of what the mean request takes alone."""

    def objective(platform: Platform, prompt: int, output: int) -> Objective:
        del prompt, output
        mean = round(prompts.mean), round(outputs.mean)
        return Objective(deadline=factor * platform.cost.isolated(*mean, platform.chunk_tokens))

    return objective


def _interactive(platform: Platform, prompt: int, output: int) -> Objective:
    del output
    unloaded = platform.cost.unloaded
    prefill = platform.cost.prefill(prompt, platform.chunk_tokens)
    return Objective(ttft=100 * unloaded + 2 * prefill, tpot=4 * unloaded)


def _steps(count: float) -> Callable[[Platform, int, int], Objective]:
    """So many unloaded steps."""
    return lambda platform, prompt, output: Objective(deadline=count * platform.cost.unloaded)


_PROMPTS, _OUTPUTS = Lengths(100, 1.0, 4), Lengths(200, 0.95)
WORKLOADS: Mapping[str, tuple[Kind, ...]] = {
    # The deadline of each request is a multiple of what it takes alone.
    "alpha": tuple(
        Kind(f"alpha-{factor}", 1 / 3, _PROMPTS, _OUTPUTS, _isolated(factor))
        for factor in (3, 5, 10)
    ),
    # Three classes of use. Objectives do not depend on the answer's length.
    "tier": (
        Kind(
            "interactive",
            0.5,
            _PROMPTS,
            Lengths(200, 0.9),
            _interactive,
            Priority.INTERACTIVE,
        ),
        Kind("app", 0.3, Lengths(300, 0.9, 4), Lengths(100, 0.8), _steps(1500)),
        Kind("batch", 0.2, Lengths(200, 1.0, 4), Lengths(500, 0.8), _steps(15000), Priority.BATCH),
    ),
    # Deadlines that static batching can meet too, as in the paper.
    "loose": tuple(
        Kind(
            f"loose-{factor}", 1 / 3, _PROMPTS, _OUTPUTS, _isolated_mean(factor, _PROMPTS, _OUTPUTS)
        )
        for factor in (10, 30, 100)
    ),
}


@dataclass(frozen=True, slots=True)
class Arrivals:
    """When requests arrive: gaps are Gamma distributed; cv 1 is a Poisson process.

    Attributes:
        rate: requests per second; ``inf``: all at once.
        cv: coefficient of variation of the gaps.
    """

    rate: float
    cv: float = 1.0


def find_workload(name: str) -> tuple[Kind, ...]:
    """A workload by name.

    Raises:
        InvalidArgumentError: if there is none.
    """
    if name not in WORKLOADS:
        raise InvalidArgumentError(
            f"workload: {name!r} is neither one of {', '.join(WORKLOADS)} nor a CSV file",
            field="workload",
        )
    return WORKLOADS[name]


def generate(
    kinds: tuple[Kind, ...],
    platform: Platform,
    arrivals: Arrivals,
    count: int,
    rng: np.random.Generator,
) -> list[Request]:
    """Requests of a workload in order of arrival.

    Raises:
        InvalidArgumentError: if the rate or the variation is not above 0.
    """
    if not (arrivals.rate > 0 and arrivals.cv > 0):
        raise InvalidArgumentError(
            f"rate {arrivals.rate:g} and cv {arrivals.cv:g} must be above 0", field="rate"
        )
    shape = 1 / arrivals.cv**2
    at = np.cumsum(rng.gamma(shape, 1 / shape, count)) / arrivals.rate
    shares = np.cumsum([kind.share for kind in kinds])
    which = np.searchsorted(shares[:-1] / shares[-1], rng.random(count), side="right")
    normal = rng.standard_normal((count, 2))
    requests = []
    for i in range(count):
        kind = kinds[int(which[i])]
        prompt, output = kind.prompt.of(normal[i, 0]), kind.output.of(normal[i, 1])
        wanted = kind.objective(platform, prompt, output)
        requests.append(
            Request(
                request_id=f"r{i:07d}",
                arrival=float(at[i]),
                prompt_tokens=prompt,
                output_tokens=output,
                kind=kind.name,
                max_tokens=MOST_TOKENS,
                deadline=wanted.deadline,
                ttft=wanted.ttft,
                tpot=wanted.tpot,
                priority=kind.priority,
            )
        )
    return requests
