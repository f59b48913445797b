"""The client library: ask a mesh, and lose no token whatever happens on the way.

async with Client("localhost:50051") as client:
    request = new_request("demo", "Count from 1 to 5.", deadline_seconds=5)
    async for event in client.generate(request):
        print(event.tokens.text, end="")
"""

from uellm.client.client import Client
from uellm.client.requests import new_request

__all__ = ["Client", "new_request"]
