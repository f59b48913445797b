"""ProfilerService: between its messages and what has been learnt."""

from collections.abc import Sequence
from typing import Any

import grpc

from uellm.convert import profile_to_proto, quantiles_to_proto
from uellm.core.errors import InvalidArgumentError, NotFoundError
from uellm.prediction.interface import GREEDY, PredictionRequest
from uellm.prediction.resources import build_profile
from uellm.telemetry import span
from uellm.v1 import profiler_pb2, profiler_pb2_grpc
from uellm_profiler.learning import Learning

MOST_ITEMS = 256


class ProfilerServicer(profiler_pb2_grpc.ProfilerServiceServicer):
    """See protos/uellm/v1/profiler.proto."""

    def __init__(self, learning: Learning) -> None:
        self._learning = learning

    async def Profile(
        self,
        request: profiler_pb2.ProfileRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> profiler_pb2.ProfileResponse:
        """Predict what requests will need."""
        del context
        check_items(request.items)
        return profiler_pb2.ProfileResponse(items=[await self._profile(i) for i in request.items])

    async def _profile(self, item: profiler_pb2.ProfileItem) -> profiler_pb2.ProfiledItem:
        try:
            model = await self._learning.model(item.model)
        except NotFoundError:
            return profiler_pb2.ProfiledItem()
        predictor = self._learning.predictor
        with span("profiler.profile", parent=item.traceparent):
            request = PredictionRequest(
                model=item.model,
                adapter=item.adapter,
                regime=item.sampling_regime or GREEDY,
                prompt_tokens=item.prompt_tokens,
                max_tokens=item.max_tokens,
                text=item.text,
            )
            [prediction] = predictor.predict_batch([request])
            profile = build_profile(
                model,
                item.prompt_tokens,
                prediction.lengths,
                item.max_tokens,
                predictor.name,
                predictor.version,
            )
        return profiler_pb2.ProfiledItem(
            profile=profile_to_proto(profile), features=prediction.features
        )

    async def DescribeModel(
        self,
        request: profiler_pb2.DescribeModelRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> profiler_pb2.DescribeModelResponse:
        """Say what has been learnt about a model."""
        del context
        await self._learning.model(request.model)
        predictor = self._learning.predictor
        return profiler_pb2.DescribeModelResponse(
            observations=predictor.observations(request.model),
            output_tokens=quantiles_to_proto(predictor.describe(request.model)),
            predictor=predictor.name,
            predictor_version=predictor.version,
        )


def check_items(items: Sequence[profiler_pb2.ProfileItem]) -> None:
    """Refuse a call that nobody should make.

    Raises:
        InvalidArgumentError: naming the field and the limit.
    """
    if not 1 <= len(items) <= MOST_ITEMS:
        raise InvalidArgumentError(
            f"items: {len(items)}; from 1 to {MOST_ITEMS} in one call", field="items"
        )
    for index, item in enumerate(items):
        if item.prompt_tokens == 0:
            raise InvalidArgumentError(
                f"items[{index}].prompt_tokens: 0; a prompt has at least one token",
                field=f"items[{index}].prompt_tokens",
            )
