"""A secret that all have who may use the mesh's Redis, and nobody else: whoever joined."""

import secrets

from uellm.streams.connection import RedisClient
from uellm.streams.keys import SECRET_KEY


async def mesh_secret(redis: RedisClient) -> str:
    """The mesh's secret; made by the first who asks, and anew if Redis lost it."""
    # A full Redis takes no writes, but can still be read.
    if (known := await redis.get(SECRET_KEY)) is None:
        await redis.set(SECRET_KEY, secrets.token_urlsafe(), nx=True)
        known = await redis.get(SECRET_KEY)
    return bytes(known).decode()
