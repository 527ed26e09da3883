"""Errors caused by what a user supplied.

Every error names the field, what was expected and what came. What happens in the normal course of a
stream (a solve that stopped early, a late bin, a gap) is a status in a result, never an exception.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question to end an error with: the known name that is nearest, or ""."""
    near = get_close_matches(name, list(known), 1)
    return f" (did you mean {near[0]!r}?)" if near else ""


class IlqrVaeError(Exception):
    """Base of every error this project raises on purpose.

    Attributes:
        field: the thing that is wrong, e.g. ``data.bin_width`` or ``counts``.
        expected: what would have been right.
        got: what came.
        exit_code: what the command line exits with.
    """

    exit_code: int = 2

    def __init__(self, field: str, *, expected: str, got: str) -> None:
        self.field = field
        self.expected = expected
        self.got = got
        super().__init__(f"{field}: expected {expected}, got {got}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors cross from one process to another."""
        return _restored, (type(self), self.args, self.__dict__)


def _restored(
    kind: type[IlqrVaeError], args: tuple[str, ...], attributes: dict[str, Any]
) -> IlqrVaeError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error


class ConfigError(IlqrVaeError):
    """A configuration file or option is wrong (unknown key, wrong type, impossible value)."""


class RecordingError(IlqrVaeError):
    """A recording cannot be read as asked (missing series, negative counts, no bins)."""


class ShapeError(IlqrVaeError):
    """An array handed to the library has the wrong shape, dtype or values."""


class ArtifactError(IlqrVaeError):
    """A model file is corrupt, of another schema version, or not a model file at all."""


class ProtocolError(IlqrVaeError):
    """A message on the wire is not what the protocol says."""


class JournalError(IlqrVaeError):
    """A service's journal cannot be read, or needs a model that is not given."""


class ServiceError(IlqrVaeError):
    """The service refused, is not reachable, or could not start (port in use).

    Base of what the client SDK raises of a running service: ``ServiceUnreachableError``,
    ``AnswerTimeoutError``, ``SessionEndedError`` and ``RequestRefusedError``. Each message names
    the service's endpoint.
    """

    exit_code = 3


class ServiceUnreachableError(ServiceError):
    """The connection is broken, or nothing was heard from the service for as long as the caller
    was ready to wait."""


class AnswerTimeoutError(ServiceError):
    """A bin was not answered in time, though there is a connection to the service."""


class RequestRefusedError(ServiceError):
    """The service refused a request or a bin.

    Attributes:
        field: what was wrong with it, e.g. ``counts``, ``index``, ``credits``, ``units[4]``.
        endpoint: the service's.
        index: of the bin; -1 if the request was no bin.
    """

    def __init__(
        self, field: str, *, expected: str, got: str, endpoint: str = "", index: int = -1
    ) -> None:
        self.endpoint, self.index = endpoint, index
        by = f" (refused by {endpoint})" if endpoint else ""
        super().__init__(f"{field}{by}", expected=expected, got=got)
        self.field = field


class SessionEndedError(ServiceError):
    """The session is not open any more.

    Attributes:
        reason: closed, idle, shutdown, "restarted: epoch N" (another client opened it again), or
            unknown (the service was restarted, and had no journal).
    """

    def __init__(self, field: str, *, reason: str) -> None:
        self.reason = reason
        super().__init__(field, expected="the session to stay open", got=f"ended ({reason})")


class TrainingError(IlqrVaeError):
    """Training cannot go on (a value that is not finite, a checkpoint of another run)."""

    exit_code = 4
