"""From what was timed to what plans are made with: fits of layers and of links. Pure."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from uellm.core.cost import StepCost, chunk_pairs
from uellm.placement.learning import AS_PREDICTED, Correction
from uellm.placement.topology import Device, LinkSpeed
from uellm.placement.views import LayerTimes, Workload
from uellm.policy.cost_fit import fit_cost

_SCATTER = 0.05
_LEAST_LEFT, _MOST_LEFT = 0.7, 1.4
"""What is beyond was disturbed."""
_BATCHES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_PREFILLS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 65536)


@dataclass(frozen=True, slots=True)
class BlockSample:
    """What one layer took in a step of one composition; see ``uellm.v1.BlockPoint``."""

    tokens: float
    context_tokens: float
    pairs: float
    layer_seconds: float
    step_seconds: float
    ends_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class BlockCost:
    """What one layer of a model takes on a device.

    Attributes:
        layer: of one layer.
        step_seconds: of a step beside its layers.
        error: median of the relative errors at the points.
        left_over: by tokens of steps that only decode, what these took in units of the fit: between
            two tokens there is no knee, as the fit has one.
        weight_bytes: the layer's weights.
        flops_per_token: its work for one token, attention aside.
        measured_at: seconds since the epoch.
        live: what was learnt since then of steps that ran.
        ends: of embedding, head and choosing tokens, by sequences; None: not measured.
        leader_seconds: what a leader does between two steps.
        agent_seconds: of a step, what a leader's computing loses to its agent.
        share: of the time that a quota lets the device compute; all seconds count the rest.
        period_seconds: of the quota.
    """

    layer: StepCost
    step_seconds: float
    error: float
    weight_bytes: float
    flops_per_token: float
    measured_at: float
    live: Correction = AS_PREDICTED
    ends: StepCost | None = None
    leader_seconds: float = 0.0
    agent_seconds: float = 0.0
    share: float = 1.0
    period_seconds: float = 0.0
    left_over: tuple[tuple[float, float], ...] = ()

    def times(self, workload: Workload) -> LayerTimes:
        """What planners take instead of a roofline, for a workload."""
        prompt = workload.prompt_tokens
        context = prompt + workload.output_tokens / 2
        knee = self.layer.knee
        return LayerTimes(
            prefill=tuple(
                (tokens, self.layer.seconds(tokens, pairs=_prompt_pairs(tokens, prompt)))
                for tokens in sorted({*map(float, _PREFILLS), float(knee)})
            ),
            decode=tuple(
                (batch, self._left(batch) * self.layer.seconds(batch, context=batch * context))
                for batch in sorted({*map(float, _BATCHES), float(knee)})
            ),
            stage=self.step_seconds,
            ends=()
            if self.ends is None
            else tuple((batch, self.ends.seconds(batch)) for batch in map(float, _BATCHES)),
            leader=self.leader_seconds,
            agent=self.agent_seconds,
            share=self.share,
            period=self.period_seconds,
        )

    def _left(self, tokens: float) -> float:
        if not self.left_over:
            return 1.0
        at, ratios = zip(*self.left_over, strict=True)
        return float(np.interp(tokens, at, ratios))

    def describe(self, device: Device) -> Device:
        """A device with the speeds that this shows, in the terms of a roofline."""
        layer = self.layer
        described = replace(
            device,
            flops_per_second=_rate(self.flops_per_token, layer.per_token),
            memory_bytes_per_second=_rate(self.weight_bytes, layer.weights),
            launch_seconds=layer.overhead,
        )
        return learnt(described, self.live)


def learnt(device: Device, found: Correction) -> Device:
    """A device as its steps were found to be; what throttles it counts where that is more."""
    slow = found.slowdown
    return replace(
        device,
        slowdown=max(slow, device.slowdown) if device.slowdown > 1 else slow,
        step_seconds=found.step_seconds,
        prefill_ratio=found.prefill_ratio,
    )


def fit_block(
    samples: Sequence[BlockSample],
    weight_bytes: float,
    flops_per_token: float,
    now: float,
    *,
    leader_seconds: float = 0.0,
    agent_seconds: float = 0.0,
    share: float = 1.0,
    period_seconds: float = 0.0,
) -> BlockCost:
    """A layer's cost from what was timed; at least one sample.

    Args:
        samples: of different compositions.
        weight_bytes: the layer's weights.
        flops_per_token: its work for one token.
        now: when they were taken, seconds since the epoch.
        leader_seconds: see ``BlockCost``.
        agent_seconds: see ``BlockCost``.
        share: see ``BlockCost``.
        period_seconds: see ``BlockCost``.
    """
    shortest = min(sample.layer_seconds for sample in samples)
    per_token = min(sample.layer_seconds / sample.tokens for sample in samples)
    start = StepCost(shortest / 4, shortest, per_token, shortest / 1e5, per_token / 1e4)
    layer = fit_cost(
        [(s.tokens, s.context_tokens, s.pairs, s.layer_seconds) for s in samples], start
    )
    errors = [
        abs(layer.seconds(s.tokens, s.context_tokens, s.pairs) / s.layer_seconds - 1)
        for s in samples
    ]
    return BlockCost(
        layer=layer,
        step_seconds=statistics.median(sample.step_seconds for sample in samples),
        error=statistics.median(errors),
        weight_bytes=weight_bytes,
        flops_per_token=flops_per_token,
        measured_at=now,
        ends=_fit_ends(samples),
        left_over=left_over(samples, layer),
        leader_seconds=leader_seconds,
        agent_seconds=agent_seconds,
        share=share,
        period_seconds=period_seconds,
    )


def left_over(samples: Sequence[BlockSample], layer: StepCost) -> tuple[tuple[float, float], ...]:
    """By tokens, what steps that only decode took in units of a fit; see ``BlockCost``."""
    ratios: dict[float, list[float]] = {}
    for sample in samples:
        if sample.context_tokens:
            predicted = layer.seconds(sample.tokens, sample.context_tokens, sample.pairs)
            ratios.setdefault(sample.tokens, []).append(sample.layer_seconds / predicted)
    return tuple(
        (tokens, min(max(statistics.median(ratios[tokens]), _LEAST_LEFT), _MOST_LEFT))
        for tokens in sorted(ratios)
    )


def _fit_ends(samples: Sequence[BlockSample]) -> StepCost | None:
    """What the ends of a replica take by its sequences, each of which has one token."""
    decodes = [s for s in samples if s.context_tokens and s.ends_seconds > 0]
    if not decodes:
        return None
    shortest = min(s.ends_seconds for s in decodes)
    per_token = min(s.ends_seconds / s.tokens for s in decodes)
    start = StepCost(shortest / 2, shortest / 2, per_token)
    return fit_cost([(s.tokens, 0.0, 0.0, s.ends_seconds) for s in decodes], start)


def fit_link(samples: Sequence[tuple[float, float]], least_seconds: float = 0.0) -> LinkSpeed:
    """Latency and bandwidth from (bytes, seconds) of messages, with the least relative error.

    ``seconds = latency + bytes / bandwidth`` (Hockney, "The communication challenge for MPP",
    1994), the latency at least that of the bare network, if that is known. At least one sample;
    where larger messages did not take longer, bandwidth is what the scatter of their times hides.
    """
    samples = [(size, max(seconds, least_seconds, 1e-9)) for size, seconds in samples]
    weights = [1.0 / seconds**2 for _, seconds in samples]
    total = sum(weights)
    mean_bytes = sum(w * size for w, (size, _) in zip(weights, samples, strict=True)) / total
    mean_seconds = sum(w * took for w, (_, took) in zip(weights, samples, strict=True)) / total
    spread = slope = 0.0
    for weight, (size, took) in zip(weights, samples, strict=True):
        spread += weight * (size - mean_bytes) ** 2
        slope += weight * (size - mean_bytes) * (took - mean_seconds)
    largest, longest = max(samples)
    per_byte = slope / spread if spread > 0 else 0.0
    if per_byte <= 0:
        least = min(took for _, took in samples)
        hidden = max(longest - least, _SCATTER * least, 1e-9)
        return LinkSpeed(max(least, least_seconds), max(largest, 1.0) / hidden)
    latency = mean_seconds - per_byte * mean_bytes
    if latency < least_seconds:
        squares = sum(w * size**2 for w, (size, _) in zip(weights, samples, strict=True))
        products = sum(
            w * size * max(took - least_seconds, _SCATTER * took)
            for w, (size, took) in zip(weights, samples, strict=True)
        )
        return LinkSpeed(least_seconds, squares / products)
    return LinkSpeed(latency, 1.0 / per_byte)


def _prompt_pairs(tokens: float, prompt: int) -> float:
    """Pairs of so many tokens of whole prompts, or of a part of one."""
    prompts, rest = divmod(tokens, prompt)
    return prompts * chunk_pairs(0, prompt) + chunk_pairs(0, int(rest))


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0
