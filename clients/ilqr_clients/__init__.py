"""Clients of a running service: the SDK, and what the command line's verbs are made of.

Nothing here needs torch. The names below are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ilqr_clients.answer import Answer
    from ilqr_clients.connection import Model, model_of
    from ilqr_clients.sdk import ServiceClient
    from ilqr_clients.session import Session
    from ilqr_vae.errors import (
        AnswerTimeoutError,
        ProtocolError,
        RequestRefusedError,
        ServiceError,
        ServiceUnreachableError,
        SessionEndedError,
        ShapeError,
    )
    from ilqr_vae.protocol.keys import ClientKey, read_client_key

_HOMES = {
    "Answer": "ilqr_clients.answer",
    "ClientKey": "ilqr_vae.protocol.keys",
    "Model": "ilqr_clients.connection",
    "ServiceClient": "ilqr_clients.sdk",
    "Session": "ilqr_clients.session",
    "model_of": "ilqr_clients.connection",
    "read_client_key": "ilqr_vae.protocol.keys",
}

__all__ = [
    "Answer",
    "AnswerTimeoutError",
    "ClientKey",
    "Model",
    "ProtocolError",
    "RequestRefusedError",
    "ServiceClient",
    "ServiceError",
    "ServiceUnreachableError",
    "Session",
    "SessionEndedError",
    "ShapeError",
    "model_of",
    "read_client_key",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "ilqr_vae.errors")), name)
