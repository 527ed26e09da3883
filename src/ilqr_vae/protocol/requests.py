"""Requests about the service itself, and its replies."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from ilqr_vae.protocol.base import Message


class Describe(Message, frozen=True, kw_only=True):
    """Request a description of the service."""


class Described(Message, frozen=True, kw_only=True):
    """The model's manifest (JSON-like) and the service's settings."""

    protocol: int
    model: str
    ready: bool
    device: str
    results: str
    manifest: dict[str, Any]


class Sessions(Message, frozen=True, kw_only=True):
    """Request the open sessions."""


class SessionInfo(msgspec.Struct, frozen=True, kw_only=True):
    session: str
    epoch: int
    bins: int
    next_index: int
    deadline_ns: int
    statuses: dict[str, int]
    solve_p50_ns: int
    solve_p99_ns: int
    bits_per_spike: float
    idle_ns: int
    model: str = ""
    revised: int = 0
    flagged: tuple[str, ...] = ()
    calibration: float | None = None


class SessionList(Message, frozen=True, kw_only=True):
    sessions: tuple[SessionInfo, ...]


class Probe(Message, frozen=True, kw_only=True):
    """Clock probe: the service answers with its own clock."""

    client_ns: int


class Probed(Message, frozen=True, kw_only=True):
    """``clock`` names the service's clock (see ``protocol.clock``); "" if it has no name."""

    client_ns: int
    service_ns: int
    clock: str = ""


class Load(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Load a model file into a slot ("" is the first) beside the served model.

    Attributes:
        path: file on the service's machine, inside its model folder.
        shadow: whether to run it beside the serving model and keep both scores; if false, serve it
            once warm.
    """

    path: str
    slot: str = ""
    shadow: bool = False


class Swap(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Serve the shadow of the slot, from the next bin of each session on."""

    slot: str = ""


class Rollback(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Drop the shadow of the slot, or serve its previous model again."""

    slot: str = ""


class Models(Message, frozen=True, kw_only=True):
    """Request the models."""


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A model of a slot.

    ``bits_per_spike`` is over the ``bins`` that it and the other model of its slot both
    answered.
    """

    slot: str
    model: str
    role: Literal["serving", "shadow", "loading", "before"]
    bins: int = 0
    bits_per_spike: float = 0.0


class ModelList(Message, frozen=True, kw_only=True):
    models: tuple[ModelInfo, ...]
