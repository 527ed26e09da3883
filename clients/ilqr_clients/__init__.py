"""Clients of a running service: the SDK, and the parts of the command-line verbs.

``ServiceClient`` makes requests to a service, ``Session`` feeds it, ``Listener`` reads its answers;
``AsyncServiceClient`` etc. do the same for asyncio. Failures and refusals of a service are
``ServiceError`` (see ``ilqr_clients.sdk``). Nothing here needs torch. Names are imported on first
use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ilqr_clients.aio import AsyncListener, AsyncServiceClient, AsyncSession
    from ilqr_clients.answer import Answer
    from ilqr_clients.connection import Model, model_of
    from ilqr_clients.listener import Listener
    from ilqr_clients.sdk import ServiceClient
    from ilqr_clients.session import Session
    from ilqr_vae.errors import (
        AnswerTimeoutError,
        IlqrVaeError,
        ProtocolError,
        RequestRefusedError,
        ServiceError,
        ServiceUnreachableError,
        SessionEndedError,
        ShapeError,
    )
    from ilqr_vae.protocol.keys import ClientKey, read_client_key

_HOMES = {
    "AsyncListener": "ilqr_clients.aio",
    "AsyncServiceClient": "ilqr_clients.aio",
    "AsyncSession": "ilqr_clients.aio",
    "Answer": "ilqr_clients.answer",
    "ClientKey": "ilqr_vae.protocol.keys",
    "Listener": "ilqr_clients.listener",
    "Model": "ilqr_clients.connection",
    "ServiceClient": "ilqr_clients.sdk",
    "Session": "ilqr_clients.session",
    "model_of": "ilqr_clients.connection",
    "read_client_key": "ilqr_vae.protocol.keys",
}

__all__ = [
    "Answer",
    "AnswerTimeoutError",
    "AsyncListener",
    "AsyncServiceClient",
    "AsyncSession",
    "ClientKey",
    "IlqrVaeError",
    "Listener",
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
