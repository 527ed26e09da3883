"""The HTTP server of /metrics, /healthz and /readyz: read-only, one thread per request, limited."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIEnvironment

from prometheus_client import CollectorRegistry, make_wsgi_app

from ilqr_service import logs
from ilqr_service.settings import http_address
from ilqr_vae.errors import ServiceError

_CONNECTIONS = 16
_REQUEST_S = 5.0
_SPACING_S, _BURST = 0.005, 50
_METRICS_SHARE = 0.2
_QUIET_S = 10.0


class _Server(ThreadingMixIn, WSGIServer):
    """Serves at most ``_CONNECTIONS`` at once, each for ``_REQUEST_S``; a new one ends the oldest.

    After a burst of ``_BURST``, further connections are accepted every ``_SPACING_S``.
    """

    daemon_threads = True
    request_queue_size = _BURST  # a connection that finds the queue full is retried after 1 s

    def __init__(self, *args: Any, **options: Any) -> None:
        self._began: dict[socket.socket, float] = {}
        self._room = threading.Lock()
        self._earliest = self._quiet_until = 0.0
        super().__init__(*args, **options)

    def process_request(self, request: Any, client_address: Any) -> None:
        now = time.monotonic()
        self._earliest = max(self._earliest + _SPACING_S, now - _BURST * _SPACING_S)
        time.sleep(max(0.0, self._earliest - now))
        with self._room:
            while len(self._began) >= _CONNECTIONS:
                self._end(next(iter(self._began)))
            self._began[request] = now
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._room:
            self._began.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """End requests that take too long, even if bytes still arrive."""
        limit = time.monotonic() - _REQUEST_S
        with self._room:
            for request in [r for r, began in self._began.items() if began < limit]:
                self._end(request)

    def _end(self, request: socket.socket) -> None:
        """Close a connection, which ends the thread that serves it."""
        del self._began[request]
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """Log an error, rate-limited: most likely the client is gone."""
        now = time.monotonic()
        if now > self._quiet_until:
            self._quiet_until = now + _QUIET_S
            logs.info("a web request broke", peer=str(client_address), error=repr(sys.exception()))


_PAGE_HEADERS = [
    ("Content-Type", "text/html; charset=utf-8"),
    ("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'"),
]
_PAGE = b"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>ilqr-vae service</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<h1>ilqr-vae service</h1>
<ul>
<li><a href="/metrics">/metrics</a>: for Prometheus
<li><a href="/healthz">/healthz</a>: 200 while its threads are alive
<li><a href="/readyz">/readyz</a>: 200 once bins are answered
</ul>
<p>To watch sessions live in a browser, run <code>ilqr-vae dashboard --to ADDRESS</code> with the
service's ingest address; in a terminal, <code>ilqr-vae monitor --to ADDRESS</code>.
</html>
"""


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = _REQUEST_S

    def log_message(self, format: str, *args: object) -> None:
        """Do not log requests."""


class Web:
    """Serves the registry and two health checks until closed.

    Args:
        address: HOST:PORT, an IPv6 host in brackets; port 0 takes a free one.
        registry: metrics to show at /metrics.
        healthy: whether the service's threads are alive (/healthz).
        ready: whether bins are answered (/readyz).

    Raises:
        ServiceError: the address is malformed, or could not be bound.
    """

    def __init__(
        self,
        address: str,
        registry: CollectorRegistry,
        *,
        healthy: Callable[[], bool],
        ready: Callable[[], bool],
    ) -> None:
        host, port = http_address(address)
        metrics = _Metrics(registry)
        checks = {"/healthz": healthy, "/readyz": ready}

        def app(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
            path = environ.get("PATH_INFO", "/")
            if path == "/metrics":
                return metrics(environ, start)
            if path == "/":
                start("200 OK", _PAGE_HEADERS)
                return [_PAGE]
            check = checks.get(path)
            if check is None:
                status, body = "404 Not Found", "/, /metrics, /healthz, /readyz\n"
            elif check():
                status, body = "200 OK", "ok\n"
            else:
                status, body = "503 Service Unavailable", f"not {path[1:-1]}\n"
            start(status, [("Content-Type", "text/plain; charset=utf-8")])
            return [body.encode()]

        try:
            server = _Server6 if ":" in host else _Server
            self._server = make_server(host, port, app, server, _Handler)
        except (OSError, OverflowError) as error:
            raise ServiceError(
                "http", expected="an address that can be bound", got=f"{address} ({error})"
            ) from error
        bound_host, bound_port = self._server.server_address[:2]
        shown = f"[{bound_host!s}]" if ":" in host else str(bound_host)
        self.address = f"{shown}:{bound_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="http"
        )
        self._thread.start()

    def close(self) -> None:
        """Stop answering and free the port."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Metrics:
    """Renders the registry, one request at a time, in at most ``_METRICS_SHARE`` of the time."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._app = make_wsgi_app(registry, disable_compression=True)
        self._turn = threading.Lock()
        self._waiting = threading.Semaphore(_CONNECTIONS)
        self._earliest = 0.0

    def __call__(self, environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        if not self._waiting.acquire(blocking=False):
            start("503 Service Unavailable", [("Retry-After", "1")])
            return [b"too many ask at once\n"]
        try:
            return self._page(environ, start)
        finally:
            self._waiting.release()

    def _page(self, environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        with self._turn:
            time.sleep(max(0.0, self._earliest - time.monotonic()))
            began = time.monotonic()
            page = self._app(environ, start)
            took = time.monotonic() - began
            self._earliest = began + min(1.0, took / _METRICS_SHARE)
        return page
