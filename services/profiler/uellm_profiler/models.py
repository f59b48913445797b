"""The deployed models, as a profiler knows them."""

import asyncio

from uellm.convert_topology import model_from_proto
from uellm.core.errors import NotFoundError
from uellm.core.model import ModelProfile
from uellm.service import Context


class Models:
    """Follows the deployments.

    Args:
        context: the service's.
        poll_seconds: how often they are looked at.

    Attributes:
        profiles: what each deployed model needs, by served name.
    """

    def __init__(self, context: Context, poll_seconds: float) -> None:
        self.profiles: dict[str, ModelProfile] = {}
        self._context = context
        self._poll_seconds = poll_seconds

    async def get(self, name: str) -> ModelProfile:
        """What a deployed model needs.

        Raises:
            NotFoundError: if it is not deployed.
        """
        if name not in self.profiles:
            await self._look()
        try:
            return self.profiles[name]
        except KeyError:
            served = ", ".join(sorted(self.profiles)) or "none"
            raise NotFoundError(
                f"model: {name!r} is not deployed; deployed: {served}",
                field="model",
                reason="MODEL_NOT_FOUND",
            ) from None

    async def poll(self) -> None:
        """Look, then wait a while."""
        await self._look()
        await asyncio.sleep(self._poll_seconds)

    async def _look(self) -> None:
        deployments = await self._context.registry.deployments()
        self.profiles = {name: model_from_proto(d.profile) for name, d in deployments.items()}
