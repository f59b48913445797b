"""Every error a caller can meet: its status, its constant, its field.

An error is raised where it is found, in domain terms; ``uellm.rpc`` maps it to a gRPC status once.
The constants follow google.rpc.ErrorInfo: ``reason`` in UPPER_SNAKE_CASE, domain ``uellm``.
"""

from typing import ClassVar


class UellmError(Exception):
    """Base of all errors with a status of their own.

    Attributes:
        code: name of the gRPC status code.
        reason: constant for machines.
        field: path of the request field at fault, or "".
        retry_after_seconds: when trying again may help, or None.
        metadata: further facts for machines (google.rpc.ErrorInfo.metadata).
    """

    code: ClassVar[str] = "INTERNAL"
    default_reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        field: str = "",
        retry_after_seconds: float | None = None,
        metadata: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.field = field
        self.retry_after_seconds = retry_after_seconds
        self.metadata = metadata or {}


class InvalidArgumentError(UellmError):
    """The request is wrong whatever the state of the mesh."""

    code = "INVALID_ARGUMENT"
    default_reason = "INVALID_ARGUMENT"


class NotFoundError(UellmError):
    """No such request, model or adapter, or it is another tenant's."""

    code = "NOT_FOUND"
    default_reason = "NOT_FOUND"


class AlreadyExistsError(UellmError):
    """The idempotency key was used for other content."""

    code = "ALREADY_EXISTS"
    default_reason = "IDEMPOTENCY_KEY_REUSED"


class FailedPreconditionError(UellmError):
    """The mesh is not in a state for this; its owner has to change something first."""

    code = "FAILED_PRECONDITION"
    default_reason = "FAILED_PRECONDITION"


class ResourceExhaustedError(UellmError):
    """A quota, a queue or a deadline budget is full; try again later."""

    code = "RESOURCE_EXHAUSTED"
    default_reason = "RESOURCE_EXHAUSTED"


class UnavailableError(UellmError):
    """A part of the mesh is not there right now; try again."""

    code = "UNAVAILABLE"
    default_reason = "UNAVAILABLE"


class AbortedError(UellmError):
    """A newer generation took over; the caller's view is old."""

    code = "ABORTED"
    default_reason = "STALE_GENERATION"


class UnauthenticatedError(UellmError):
    """No credential, or a wrong one."""

    code = "UNAUTHENTICATED"
    default_reason = "UNAUTHENTICATED"


class UnimplementedError(UellmError):
    """Understood, but not offered."""

    code = "UNIMPLEMENTED"
    default_reason = "UNIMPLEMENTED"


class ConfigurationError(UellmError):
    """A service cannot start as it was told to."""

    code = "FAILED_PRECONDITION"
    default_reason = "CONFIGURATION"


class ModelFilesError(ConfigurationError):
    """A checkpoint is missing, incomplete, changed or of a kind that is not served."""

    default_reason = "MODEL_FILES"
