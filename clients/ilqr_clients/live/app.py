"""The live page over HTTP: files of this package, the state, and a stream of answers.

Answers go out as server-sent events: plain HTTP, one way, and a browser connects again by itself.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ilqr_clients.live.feed import LiveFeed

FRAME_S = 1 / 30
"""Between two pieces of the stream: thirty pictures a second."""
MOST_AT_ONCE = 2000
"""Entries in one piece; a viewer that falls behind misses the oldest."""

_TYPES = {
    "index.html": "text/html",
    "live.js": "text/javascript",
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


class Guard:
    """Refuses a request for another host, by another method, or without the token.

    Args:
        app: what is guarded.
        hosts: names that this page may be asked for by; a page of another name that resolves to
            this address is not let in.
        token: that every request must name as ``?token=``; "" for none.
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
        given = request.query_params.get("token", "")
        if self._token and not hmac.compare_digest(given.encode(), self._token.encode()):
            return PlainTextResponse("token: expected the one in the address printed\n", 403)
        return None


def application(feed: LiveFeed, *, hosts: frozenset[str] = frozenset(), token: str = "") -> ASGIApp:
    """The page of a feed."""
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

    routes = [
        Route("/", asset),
        Route("/state", state),
        Route("/stream", stream),
        Route("/{name}", asset),
    ]
    return Guard(Starlette(routes=routes), hosts=hosts, token=token)


async def _events(feed: LiveFeed, session: str, request: Request) -> AsyncIterator[bytes]:
    """State when it changes, alarms as they come, and the session's answers."""
    position = alarm = 0
    told: dict[str, Any] = {}
    epoch = -2
    while not await request.is_disconnected():
        with feed.lock:
            state = feed.state
            alarms = [one for one in feed.alarms if one["n"] > alarm]
            channel = feed.channels.get(session)
            bins: list[dict[str, Any]] = []
            fresh = False
            if channel is not None:
                fresh, epoch = channel.epoch != epoch, channel.epoch
                bins, position = channel.after(0 if fresh else position)
        piece: dict[str, Any] = {}
        if state is not told:
            piece["state"] = told = state
        if alarms:
            piece["alarms"], alarm = alarms, alarms[-1]["n"]
        if bins or fresh:
            piece["bins"], piece["fresh"] = bins[-MOST_AT_ONCE:], fresh
        if piece:
            yield b"data: " + json.dumps(piece, separators=(",", ":")).encode() + b"\n\n"
        await asyncio.sleep(FRAME_S)
