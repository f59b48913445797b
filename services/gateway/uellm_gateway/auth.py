"""Who calls: found out once per call, before its handler runs.

Today every call is the local tenant's. API keys come in here and nowhere else: whatever this
interceptor decides is in every record and key, and another tenant's request does not exist.
"""

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc


@dataclass(frozen=True, slots=True)
class Caller:
    """On whose behalf a call runs.

    Attributes:
        tenant: who pays and who may see the result.
        scope: what the credential allows; "all" is everything.
    """

    tenant: str
    scope: str


LOCAL = Caller("local", "all")
_caller: ContextVar[Caller] = ContextVar("uellm_caller")


def current_caller() -> Caller:
    """The caller of the present call.

    Raises:
        LookupError: outside a call that passed the interceptor; nothing runs unauthenticated.
    """
    return _caller.get()


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Sets the caller for the task that serves the call."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """See grpc.aio.ServerInterceptor. gRPC runs this and the handler in one task."""
        _caller.set(LOCAL)
        return await continuation(handler_call_details)
