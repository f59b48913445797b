"""A request's profile: the profiler's if it answers in time, else the prior's own."""

from collections.abc import Sequence

from uellm import convert
from uellm.core.request import LEVELS, QuantileFunction
from uellm.models.prompt import Prompt
from uellm.prediction.interface import (
    MOST_FEATURE_BYTES,
    CompletionFacts,
    PredictionRequest,
    sampling_regime,
)
from uellm.prediction.prior import Prior, PriorSettings
from uellm.prediction.resources import build_profile
from uellm.v1 import common_pb2, inference_pb2, profiler_pb2
from uellm_gateway.models import ServedModel
from uellm_gateway.peers import Peers
from uellm_gateway.profiler_calls import ProfilerCalls

FEWEST_LEVELS = 9
MOST_TEXT_CHARACTERS = 16_384
_WINDOWS = PriorSettings(cell_window=64, model_window=256)
"""Short ones: where no profiler answers, every request waits for what they say."""
_ENDED = (common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH)


class Profiling:
    """Asks a profiler, and answers itself where none does, from the answers streamed from here.

    Args:
        peers: the profilers.
        budget_seconds: longest time to wait for one.
    """

    def __init__(self, peers: Peers, budget_seconds: float) -> None:
        self._calls = ProfilerCalls(peers, budget_seconds)
        self._prior = Prior(_WINDOWS)

    async def profile(
        self,
        model: ServedModel,
        adapter: str,
        sampling: common_pb2.Sampling,
        prompt: Prompt,
        text: str,
        traceparent: str = "",
    ) -> profiler_pb2.ProfiledItem:
        """What a request will need, and what was seen of its prompt; never fails.

        Args:
            model: the model.
            adapter: its adapter, or "".
            sampling: with defaults filled in.
            prompt: by the model's tokenizer.
            text: the prompt as the user wrote it.
            traceparent: W3C context to pass on.
        """
        item = profiler_pb2.ProfileItem(
            model=model.name,
            adapter=adapter,
            sampling_regime=sampling_regime(sampling.temperature),
            prompt_tokens=len(prompt.ids),
            max_tokens=sampling.max_tokens,
            text=text[:MOST_TEXT_CHARACTERS],
            traceparent=traceparent,
            image_tokens=prompt.image_tokens,
            image_flops=prompt.image_flops,
        )
        profiled = await self._calls.profile(item)
        if profiled is not None and _is_sound(profiled):
            return profiled
        return profiler_pb2.ProfiledItem(profile=self._fallback(model, item))

    def learn(
        self,
        model: str,
        adapter: str,
        sampling: common_pb2.Sampling,
        finished: inference_pb2.Finished,
    ) -> None:
        """Take an answer that was streamed from here, for when no profiler says anything."""
        if finished.reason in _ENDED:
            self._prior.observe(
                CompletionFacts(
                    model=model,
                    adapter=adapter,
                    regime=sampling_regime(sampling.temperature),
                    prompt_tokens=finished.usage.prompt_tokens,
                    output_tokens=finished.usage.output_tokens,
                    censored=finished.reason == common_pb2.FINISH_REASON_LENGTH,
                )
            )

    def _fallback(
        self, model: ServedModel, item: profiler_pb2.ProfileItem
    ) -> common_pb2.ResourceProfile:
        asked = PredictionRequest(
            model=item.model,
            adapter=item.adapter,
            regime=item.sampling_regime,
            prompt_tokens=item.prompt_tokens,
            max_tokens=item.max_tokens,
        )
        profile = build_profile(
            model.profile,
            item.prompt_tokens,
            self._prior.predict(asked),
            item.max_tokens,
            self._prior.name,
            self._prior.version,
            fallback=True,
            image_tokens=item.image_tokens,
            image_flops=item.image_flops,
        )
        return convert.profile_to_proto(profile)


def _is_sound(profiled: profiler_pb2.ProfiledItem) -> bool:
    """Whether a profile keeps what its contract says; everyone behind the gateway relies on it."""
    if len(profiled.features) > MOST_FEATURE_BYTES:
        return False
    quantiles = profiled.profile.output_tokens
    if len(quantiles.levels) < FEWEST_LEVELS or quantiles.levels[-1] < LEVELS[-1]:
        return False
    return _ascends(quantiles.levels, quantiles.values)


def _ascends(levels: Sequence[float], values: Sequence[float]) -> bool:
    try:
        QuantileFunction(levels, values)
    except ValueError:
        return False
    return True
