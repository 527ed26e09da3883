"""Clients of a running service: the SDK, and what the command line's verbs are made of.

``ServiceClient`` asks about a service, ``Session`` feeds it, ``Listener`` reads what it answers;
``AsyncServiceClient`` and so on are the same for asyncio. What a service does wrong or refuses is a
``ServiceError`` (see ``ilqr_clients.sdk``). Nothing here needs torch.
The names below are imported when they are first used.
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
