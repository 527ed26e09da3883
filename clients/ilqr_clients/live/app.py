"""The HTTP server of the live page: static files, the state, and a stream of answers.

Answers are server-sent events: plain HTTP, one-way, and browsers reconnect by themselves.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ilqr_clients.live.feed import LiveFeed
from ilqr_vae.errors import IlqrVaeError

FRAME_S = 1 / 30
"""Time between two chunks of the stream: thirty per second."""
MOST_AT_ONCE = 200
"""Largest number of entries in a chunk."""
_MOST_BODY = 4096

SCRIPTS = ("live.js", "core.js", "charts.js", "planes.js", "units.js", "whatif.js")
_TYPES = {
    "index.html": "text/html",
    **dict.fromkeys(SCRIPTS, "text/javascript"),
    "live.css": "text/css",
    "uPlot.iife.min.js": "text/javascript",
    "uPlot.min.css": "text/css",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def _content(name: str) -> bytes:
    folder = "ilqr_vae.report.uplot" if name.startswith("uPlot") else "ilqr_clients.live"
    package, _, inside = folder.rpartition(".")
    return (files(package) / inside / name).read_bytes()


class _Steer(msgspec.Struct):
    """A viewer's request to steer a run."""

    session: str
    change: dict[str, Any]


class Guard:
    """Refuses requests for another host, from another page, or without the token.

    Args:
        app: the guarded application.
        hosts: accepted host names; other names that resolve to this address are refused.
        token: required as ``?token=`` in each request, except for scripts and styles, which are
            public; "" for none.
    """

    def __init__(self, app: ASGIApp, *, hosts: frozenset[str], token: str) -> None:
        self._app, self._hosts, self._token = app, hosts, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refused := self._refusal(Request(scope))) is not None:
            await refused(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, request: Request) -> Response | None:
        host = request.headers.get("host", "").rsplit(":", 1)[0].strip("[]")
        if self._hosts and host not in self._hosts:
            return PlainTextResponse("host: expected this page's own\n", 400)
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host", ""):
            return PlainTextResponse("origin: expected this page\n", 403)
        if request.url.path.lstrip("/") in _TYPES and not request.url.path.endswith(".html"):
            return None
        given = request.query_params.get("token", "")
        if self._token and not hmac.compare_digest(given.encode(), self._token.encode()):
            return PlainTextResponse("token: expected the one in the address printed\n", 403)
        return None


def application(feed: LiveFeed, *, hosts: frozenset[str] = frozenset(), token: str = "") -> ASGIApp:
    """Return the application for a feed."""
    contents = {name: _content(name) for name in _TYPES}

    async def asset(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in contents:
            return PlainTextResponse("not found\n", 404, headers=_HEADERS)
        return Response(contents[name], media_type=_TYPES[name], headers=_HEADERS)

    async def state(_: Request) -> Response:
        with feed.lock:
            return JSONResponse(feed.state, headers=_HEADERS)

    async def stream(request: Request) -> Response:
        events = _events(feed, request.query_params.get("session", ""), request)
        return StreamingResponse(events, media_type="text/event-stream", headers=_HEADERS)

    async def steer(request: Request) -> Response:
        if request.headers.get("content-type", "").split(";")[0] != "application/json":
            return PlainTextResponse("content-type: expected application/json\n", 415)
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > _MOST_BODY:
                return PlainTextResponse("body: expected a small one\n", 413)
        try:
            asked = msgspec.json.decode(body, type=_Steer)
            state = await asyncio.to_thread(feed.steer, asked.session, asked.change)
        except (IlqrVaeError, msgspec.MsgspecError) as error:
            return PlainTextResponse(f"{error}\n", 409, headers=_HEADERS)
        return JSONResponse(state, headers=_HEADERS)

    routes = [
        *([Route("/steer", steer, methods=["POST"])] if feed.what_if else []),
        Route("/", asset),
        Route("/state", state),
        Route("/stream", stream),
        Route("/{name}", asset),
    ]
    return Guard(Starlette(routes=routes), hosts=hosts, token=token)


async def _events(feed: LiveFeed, session: str, request: Request) -> AsyncIterator[bytes]:
    """Yield the state when it changes, alarms, and the answers of the session."""
    position = alarm = 0
    told: dict[str, Any] = {}
    begun = -1
    due = time.monotonic()
    while not await request.is_disconnected():
        with feed.lock:
            state = feed.state
            news = feed.alarms and feed.alarms[-1]["n"] > alarm
            alarms = [one for one in feed.alarms if one["n"] > alarm] if news else []
            channel = feed.channels.get(session)
            entries: list[bytes] = []
            fresh = False
            if channel is not None:
                fresh, begun = channel.begun != begun, channel.begun
                entries, position = channel.after(0 if fresh else position, MOST_AT_ONCE)
        piece: dict[str, Any] = {}
        if state is not told:
            piece["state"] = told = state
        if alarms:
            piece["alarms"], alarm = alarms, alarms[-1]["n"]
        if entries or fresh:
            piece["fresh"] = fresh
            piece["log"] = msgspec.Raw(b"[" + b",".join(entries) + b"]")
        if piece:
            yield b"data: " + msgspec.json.encode(piece) + b"\n\n"
        if len(entries) < MOST_AT_ONCE:
            due = max(due + FRAME_S, time.monotonic())
            await asyncio.sleep(due - time.monotonic())
