"""The errors of farstep, and the one table that ties them to names on the wire and to gRPC statuses.

    FarstepError
    ├── ConfigurationError (ValueError)        an argument, address or variable is wrong; nothing was sent
    ├── UnavailableError (ConnectionError)     no server answers there, or it went away
    │   └── DeadlineError (TimeoutError)       no answer within the time allowed
    └── RefusedError                           the server answered, and said no
        ├── InvalidRequestError (ValueError)   a field is malformed or out of range
        ├── ProtocolError                      the two sides speak different revisions
        ├── UnknownOptimizerError (ValueError) the server knows no optimizer class of that name
        ├── ArgumentsError (ValueError)        the class does not take these arguments
        ├── NotFoundError (LookupError)        no hosted optimizer, snapshot or parameter of that name
        ├── AlreadyExistsError                 on_existing="error", and there is one
        ├── LayoutMismatchError (ValueError)   parameters differ from those that are hosted
        ├── MismatchError (ValueError)         class, policy or hyperparameters differ between workers
        ├── ResourceExhaustedError             past a limit; says what was asked for and what is left
        ├── WaitError                          other workers did not come in time
        ├── FencedError                        a newer session of this worker id has taken over
        │   └── LeaseError                     this worker's lease ran out; it may attach again
        ├── RemovedError                       the hosted optimizer was removed while in use
        ├── RollbackError                      acknowledged steps are gone: the server is back at an older version
        ├── StepFailedError                    the optimizer raised; the step was rolled back
        ├── ClosureError                       a closure failed or its worker died; the step was rolled back
        ├── NonFiniteError (ArithmeticError)   a gradient has an infinity or NaN, and the guard is set to raise
        ├── GradientsLostError                 what this worker had accumulated on the server is gone
        ├── StorageError                       a snapshot could not be written or read
        ├── DrainingError                      the server is shutting down
        └── InternalError                      a defect of farstep

Every error has ``applied``: whether the step that it is about took effect.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Applied(enum.Enum):
    """Whether a step took effect."""

    NONE = "not about a step"
    NO = "the step was not applied"
    YES = "the step was applied"
    UNKNOWN = "whether the step was applied is unknown"


class FarstepError(Exception):
    """Any failure that farstep reports.

    ``applied`` says whether the step in question took effect; ``code`` is the stable name of the failure.
    """

    code = "INTERNAL"

    def __init__(self, message: str, *, applied: Applied = Applied.NONE) -> None:
        super().__init__(message)
        self.applied = applied

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), str(self), self.applied)


def _rebuild(kind: type[FarstepError], message: str, applied: Applied) -> FarstepError:
    return kind(message, applied=applied)


class ConfigurationError(FarstepError, ValueError):
    """An argument, address or environment variable is wrong. Nothing was sent."""

    code = "CONFIGURATION"


class UnavailableError(FarstepError, ConnectionError):
    """No server answers at the address, or the connection broke and could not be made again in time."""

    code = "UNAVAILABLE"


class DeadlineError(UnavailableError, TimeoutError):
    """The server did not answer within the time allowed."""

    code = "DEADLINE"


class RefusedError(FarstepError):
    """The server answered, and did not carry the request out."""


class InvalidRequestError(RefusedError, ValueError):
    """A field of the request is malformed or out of range."""

    code = "INVALID_REQUEST"


class ProtocolError(RefusedError):
    """Client and server speak different revisions of the protocol."""

    code = "PROTOCOL"


class UnknownOptimizerError(RefusedError, ValueError):
    """The server knows no optimizer class of that name."""

    code = "UNKNOWN_OPTIMIZER"


class ArgumentsError(RefusedError, ValueError):
    """The optimizer class does not take these arguments, or raised while it was built."""

    code = "ARGUMENTS"


class NotFoundError(RefusedError, LookupError):
    """There is no hosted optimizer, snapshot or parameter of that name."""

    code = "NOT_FOUND"


class AlreadyExistsError(RefusedError):
    """A hosted optimizer of that name exists, and the client asked for a new one."""

    code = "ALREADY_EXISTS"


class LayoutMismatchError(RefusedError, ValueError):
    """The parameters differ from those that are hosted under that name."""

    code = "LAYOUT_MISMATCH"


class MismatchError(RefusedError, ValueError):
    """Class, policy or hyperparameters differ from those of the hosted optimizer or of another worker."""

    code = "MISMATCH"


class ResourceExhaustedError(RefusedError):
    """The request is past a limit of the server."""

    code = "RESOURCE_EXHAUSTED"


class WaitError(RefusedError):
    """The workers that must take part did not come in time."""

    code = "WAIT"


class FencedError(RefusedError):
    """A newer session has taken over this worker id."""

    code = "FENCED"


class LeaseError(FencedError):
    """This worker's lease ran out, and the round went on without it. Attaching again makes it a member again."""

    code = "LEASE"


class RemovedError(RefusedError):
    """The hosted optimizer was removed while this worker used it."""

    code = "REMOVED"


class RollbackError(RefusedError):
    """The server is back at an older version than one it had acknowledged."""

    code = "ROLLBACK"


class StepFailedError(RefusedError):
    """The optimizer raised during its step; the step was rolled back."""

    code = "STEP_FAILED"


class ClosureError(RefusedError):
    """A closure failed on a worker, or its worker died; the step was rolled back."""

    code = "CLOSURE"


class NonFiniteError(RefusedError, ArithmeticError):
    """A gradient has an infinity or NaN, and the hosted optimizer's non-finite guard is set to raise. Nobody stepped."""

    code = "NON_FINITE"


class GradientsLostError(RefusedError):
    """Gradients that this worker had accumulated on the server are gone; its contribution was not used."""

    code = "GRADIENTS_LOST"


class StorageError(RefusedError):
    """A snapshot could not be written or read."""

    code = "STORAGE"


class DrainingError(RefusedError):
    """The server is shutting down and takes no new work."""

    code = "DRAINING"


class InternalError(RefusedError):
    """A defect of farstep itself."""

    code = "INTERNAL"


@dataclass(frozen=True)
class ErrorRow:
    """One row of the error table."""

    kind: type[FarstepError]
    grpc_status: str


_ROWS = (
    ErrorRow(ConfigurationError, "INVALID_ARGUMENT"),
    ErrorRow(UnavailableError, "UNAVAILABLE"),
    ErrorRow(DeadlineError, "DEADLINE_EXCEEDED"),
    ErrorRow(InvalidRequestError, "INVALID_ARGUMENT"),
    ErrorRow(ProtocolError, "FAILED_PRECONDITION"),
    ErrorRow(UnknownOptimizerError, "INVALID_ARGUMENT"),
    ErrorRow(ArgumentsError, "INVALID_ARGUMENT"),
    ErrorRow(NotFoundError, "NOT_FOUND"),
    ErrorRow(AlreadyExistsError, "ALREADY_EXISTS"),
    ErrorRow(LayoutMismatchError, "FAILED_PRECONDITION"),
    ErrorRow(MismatchError, "FAILED_PRECONDITION"),
    ErrorRow(ResourceExhaustedError, "RESOURCE_EXHAUSTED"),
    ErrorRow(WaitError, "DEADLINE_EXCEEDED"),
    ErrorRow(FencedError, "ABORTED"),
    ErrorRow(LeaseError, "ABORTED"),
    ErrorRow(RemovedError, "NOT_FOUND"),
    ErrorRow(RollbackError, "ABORTED"),
    ErrorRow(StepFailedError, "FAILED_PRECONDITION"),
    ErrorRow(ClosureError, "ABORTED"),
    ErrorRow(NonFiniteError, "FAILED_PRECONDITION"),
    ErrorRow(GradientsLostError, "ABORTED"),
    ErrorRow(StorageError, "INTERNAL"),
    ErrorRow(DrainingError, "UNAVAILABLE"),
    ErrorRow(InternalError, "INTERNAL"),
)

ERROR_TABLE: dict[str, ErrorRow] = {row.kind.code: row for row in _ROWS}
"""Every code with the class that stands for it here and the gRPC status that stands for it on the wire."""


def error_for(code: str, message: str, applied: Applied) -> FarstepError:
    """Return the error that stands for a code from the wire; an unknown code becomes a plain RefusedError."""
    row = ERROR_TABLE.get(code)
    kind = row.kind if row is not None else RefusedError
    text = message if row is not None else f"{message} (the server's code {code!r} is unknown to this client)"
    return kind(text, applied=applied)
