"""Errors caused by user input.

Every error names the field, what was expected and what came. Normal events of a stream (a solve
that stopped early, a late bin, a gap) are statuses in results, never exceptions.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from enum import StrEnum
from typing import Any


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a suggestion to append to an error: the closest known name, or ""."""
    near = get_close_matches(name, list(known), 1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def number_of(number: int, noun: str) -> str:
    """Return a number with its noun in the singular or plural: ``1 bin``, ``2 bins``."""
    return f"{number} {noun}" + ("" if number == 1 else "es" if noun[-1:] in "sh" else "s")


def spanned(noun: str, first: int, last: int) -> str:
    """Return the name of a span of numbered things: ``bin 3``, ``bins 3 to 5``."""
    return f"{noun} {first}" if first == last else f"{noun}s {first} to {last}"


class IlqrVaeError(Exception):
    """Base of all errors that this project raises deliberately.

    Attributes:
        field: what is wrong, e.g. ``data.bin_width`` or ``counts``.
        expected: what was expected.
        got: what came instead.
        exit_code: exit code of the command line.
    """

    exit_code: int = 2

    def __init__(self, field: str, *, expected: str, got: str) -> None:
        self.field = field
        self.expected = expected
        self.got = got
        super().__init__(f"{field}: expected {expected}, got {got}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Support pickling, for errors that cross processes."""
        return _restored, (type(self), self.args, self.__dict__)


def _restored(
    kind: type[IlqrVaeError], args: tuple[str, ...], attributes: dict[str, Any]
) -> IlqrVaeError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error


class ConfigError(IlqrVaeError):
    """A configuration file or option is invalid (unknown key, wrong type, impossible value)."""


class RecordingError(IlqrVaeError):
    """A recording cannot be read as requested (missing series, negative counts, no bins)."""


class ShapeError(IlqrVaeError):
    """An array argument has the wrong shape, dtype or values."""


class ArtifactError(IlqrVaeError):
    """A model file is corrupt, of another schema version, or not a model file at all."""


class ProtocolError(IlqrVaeError):
    """A message violates the protocol."""


class JournalError(IlqrVaeError):
    """A journal cannot be read, or needs a model that is not given."""


class ServiceError(IlqrVaeError):
    """The service refused, is not reachable, or could not start (port in use).

    Base of the errors that the client SDK raises for a running service:
    ``ServiceUnreachableError``, ``AnswerTimeoutError``, ``SessionEndedError`` and
    ``RequestRefusedError``. Each message names the endpoint.
    """

    exit_code = 3


class ServiceUnreachableError(ServiceError):
    """The connection is broken, or the service sent nothing within the time limit."""


class AnswerTimeoutError(ServiceError):
    """A bin was not answered in time, though there is a connection to the service."""


class RequestRefusedError(ServiceError):
    """The service refused a request or a bin.

    Attributes:
        field: the invalid field, e.g. ``counts``, ``index``, ``credits``, ``units[4]``.
        endpoint: address of the service.
        index: index of the bin; -1 for other requests.
    """

    def __init__(
        self, field: str, *, expected: str, got: str, endpoint: str = "", index: int = -1
    ) -> None:
        self.endpoint, self.index = endpoint, index
        by = f" (refused by {endpoint})" if endpoint else ""
        super().__init__(f"{field}{by}", expected=expected, got=got)
        self.field = field


class SessionEnd(StrEnum):
    """Why a session is not open any more: the first word of the service's last notice of it."""

    CLOSED = "closed"
    """Its feeder closed it."""
    IDLE = "idle"
    """Its feeder sent nothing for too long."""
    SHUTDOWN = "shutdown"
    """The service stopped."""
    TAKEN = "restarted"
    """Another client opened it again, under a higher epoch."""
    UNKNOWN = "unknown"
    """The service does not know it: it was restarted without a journal."""

    @classmethod
    def of(cls, notice: str) -> SessionEnd | None:
        """Return the end that a notice tells; None for one of a session that goes on."""
        word = notice.partition(":")[0].partition(" ")[0]
        return cls(word) if word in set(cls) else None


class SessionEndedError(ServiceError):
    """The session is not open any more.

    Attributes:
        reason: the service's last notice, e.g. ``idle`` or ``restarted: epoch 1``.
        end: the same as a ``SessionEnd``.
    """

    def __init__(self, field: str, *, reason: str) -> None:
        self.reason = reason
        self.end = SessionEnd.of(reason) or SessionEnd.UNKNOWN
        super().__init__(field, expected="the session to stay open", got=f"ended ({reason})")


class TrainingError(IlqrVaeError):
    """Training cannot continue (a value that is not finite, a checkpoint of another run)."""

    exit_code = 4
