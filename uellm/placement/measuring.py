"""From what was timed to what plans are made with: fits of layers and of links. Pure."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from uellm.core.cost import StepCost, chunk_pairs
from uellm.placement.topology import Device, LinkSpeed
from uellm.placement.views import LayerTimes, Workload
from uellm.policy.latency import fit_cost

_SCATTER = 0.05
LIVE_WEIGHT = 0.2
"""Share of the newest comparison in a smoothed ratio."""
_LEAST_RATIO, _MOST_RATIO = 0.2, 20.0
"""What is beyond was not a step like those that were measured."""
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


@dataclass(frozen=True, slots=True)
class BlockCost:
    """What one layer of a model takes on a device.

    Attributes:
        layer: of one layer.
        step_seconds: of a step beside its layers.
        error: median of the relative errors at the points.
        weight_bytes: the layer's weights.
        flops_per_token: its work for one token, attention aside.
        measured_at: seconds since the epoch.
        live_ratio: what steps take since then in units of this, smoothed; 1: as measured.
    """

    layer: StepCost
    step_seconds: float
    error: float
    weight_bytes: float
    flops_per_token: float
    measured_at: float
    live_ratio: float = 1.0

    def seconds(
        self, layers: float, tokens: float, context: float = 0.0, pairs: float = 0.0
    ) -> float:
        """What a step takes on so many layers, as measured."""
        return self.step_seconds + layers * self.layer.seconds(tokens, context, pairs)

    def seen(self, layers: float, tokens: float, context: float, seconds: float) -> "BlockCost":
        """The same, having seen a step that only decodes take so many seconds.

        Args:
            layers: that the device computed; what it holds besides counts by its weight.
            tokens: sequences that decoded.
            context: tokens that they attended to.
            seconds: what it took.
        """
        ratio = seconds / self.seconds(layers, tokens, context)
        if not _LEAST_RATIO <= ratio <= _MOST_RATIO:
            return self
        return replace(self, live_ratio=self.live_ratio + LIVE_WEIGHT * (ratio - self.live_ratio))

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
                (batch, self.layer.seconds(batch, context=batch * context))
                for batch in sorted({*map(float, _BATCHES), float(knee)})
            ),
            stage=self.step_seconds,
        )

    def describe(self, device: Device) -> Device:
        """A device with the speeds that this shows, in the terms of a roofline."""
        layer = self.layer
        return replace(
            device,
            flops_per_second=_rate(self.flops_per_token, layer.per_token),
            memory_bytes_per_second=_rate(self.weight_bytes, layer.weights),
            launch_seconds=layer.overhead,
            slowdown=max(device.slowdown, self.live_ratio),
        )


def fit_block(
    samples: Sequence[BlockSample], weight_bytes: float, flops_per_token: float, now: float
) -> BlockCost:
    """A layer's cost from what was timed; at least one sample.

    Args:
        samples: of different compositions.
        weight_bytes: the layer's weights.
        flops_per_token: its work for one token.
        now: when they were taken, seconds since the epoch.
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
    )


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
