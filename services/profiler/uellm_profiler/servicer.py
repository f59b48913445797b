"""ProfilerService: between its messages and what has been learnt."""

from typing import Any

import grpc

from uellm.convert import profile_to_proto, quantiles_to_proto
from uellm.core.errors import InvalidArgumentError
from uellm.prediction.interface import GREEDY, PredictionRequest
from uellm.prediction.resources import build_profile
from uellm.v1 import profiler_pb2, profiler_pb2_grpc
from uellm_profiler.learning import Learning


class ProfilerServicer(profiler_pb2_grpc.ProfilerServiceServicer):
    """See protos/uellm/v1/profiler.proto."""

    def __init__(self, learning: Learning) -> None:
        self._learning = learning

    async def Profile(
        self,
        request: profiler_pb2.ProfileRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> profiler_pb2.ProfileResponse:
        """Predict what a request will need."""
        del context
        if request.prompt_tokens == 0:
            raise InvalidArgumentError(
                "prompt_tokens: 0; a prompt has at least one token", field="prompt_tokens"
            )
        model = await self._learning.model(request.model)
        predictor = self._learning.predictor
        quantiles = predictor.predict(
            PredictionRequest(
                model=request.model,
                adapter=request.adapter,
                regime=request.sampling_regime or GREEDY,
                prompt_tokens=request.prompt_tokens,
                max_tokens=request.max_tokens,
                text=request.text,
            )
        )
        profile = build_profile(
            model,
            request.prompt_tokens,
            quantiles,
            request.max_tokens,
            predictor.name,
            predictor.version,
        )
        return profiler_pb2.ProfileResponse(profile=profile_to_proto(profile))

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
