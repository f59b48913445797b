"""ProfilerService: between its messages and what has been learnt."""

import contextlib
from collections.abc import Sequence
from typing import Any

import grpc

from uellm.convert import profile_to_proto, quantiles_to_proto
from uellm.core.errors import InvalidArgumentError, NotFoundError
from uellm.core.model import ModelProfile
from uellm.prediction.interface import GREEDY, Prediction, PredictionRequest
from uellm.prediction.resources import build_profile
from uellm.telemetry import span
from uellm.v1 import profiler_pb2, profiler_pb2_grpc
from uellm_profiler.models import Models
from uellm_profiler.serving import Serving
from uellm_profiler.store import Store

MOST_ITEMS = 256


class ProfilerServicer(profiler_pb2_grpc.ProfilerServiceServicer):
    """See protos/uellm/v1/profiler.proto."""

    def __init__(self, models: Models, serving: Serving, store: Store) -> None:
        self._models = models
        self._serving = serving
        self._store = store

    async def Profile(
        self,
        request: profiler_pb2.ProfileRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> profiler_pb2.ProfileResponse:
        """Predict what requests will need."""
        check_items(request.items)
        models = [await self._model(item.model) for item in request.items]
        known = [item for item, model in zip(request.items, models, strict=True) if model]
        with contextlib.ExitStack() as spans:
            for item in known:
                spans.enter_context(span("profiler.profile", parent=item.traceparent))
            found = iter(
                await self._serving.predict(
                    [_asked(item) for item in known], context.time_remaining()
                )
            )
        return profiler_pb2.ProfileResponse(
            items=[
                self._profiled(item, model, next(found)) if model else profiler_pb2.ProfiledItem()
                for item, model in zip(request.items, models, strict=True)
            ]
        )

    async def _model(self, name: str) -> ModelProfile | None:
        try:
            return await self._models.get(name)
        except NotFoundError:
            return None

    def _profiled(
        self, item: profiler_pb2.ProfileItem, model: ModelProfile, prediction: Prediction | None
    ) -> profiler_pb2.ProfiledItem:
        if prediction is None:
            return profiler_pb2.ProfiledItem()
        profile = build_profile(
            model,
            item.prompt_tokens,
            prediction.lengths,
            item.max_tokens,
            prediction.by or self._serving.predictor.name,
            self._serving.version,
            image_tokens=item.image_tokens,
            image_flops=item.image_flops,
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
        await self._models.get(request.model)
        predictor = self._serving.predictor
        return profiler_pb2.DescribeModelResponse(
            observations=predictor.observations(request.model),
            output_tokens=quantiles_to_proto(predictor.describe(request.model)),
            predictor=predictor.name,
            predictor_version=self._serving.version,
        )

    async def ListVersions(
        self,
        request: profiler_pb2.ListVersionsRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> profiler_pb2.ListVersionsResponse:
        """Say which versions are kept."""
        del request, context
        return profiler_pb2.ListVersionsResponse(versions=await self._store.versions())

    async def Rollback(
        self,
        request: profiler_pb2.RollbackRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> profiler_pb2.RollbackResponse:
        """Have the learner let an earlier version serve."""
        del context
        versions = await self._store.versions()
        earlier = [version.number for version in versions[:-1]]
        if request.number not in earlier:
            kept = ", ".join(map(str, earlier)) or "none"
            raise InvalidArgumentError(
                f"number: {request.number} is no earlier version that is kept; these are: {kept}",
                field="number",
            )
        await self._store.want(request.number)
        return profiler_pb2.RollbackResponse()


def _asked(item: profiler_pb2.ProfileItem) -> PredictionRequest:
    return PredictionRequest(
        model=item.model,
        adapter=item.adapter,
        regime=item.sampling_regime or GREEDY,
        prompt_tokens=item.prompt_tokens,
        max_tokens=item.max_tokens,
        text=item.text,
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
        if item.image_tokens > item.prompt_tokens:
            raise InvalidArgumentError(
                f"items[{index}].image_tokens: {item.image_tokens}; they are among prompt_tokens, "
                f"which are {item.prompt_tokens}",
                field=f"items[{index}].image_tokens",
            )
