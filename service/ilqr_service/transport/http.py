"""The HTTP side: /metrics, /healthz, /readyz. Read-only; one thread a request."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIEnvironment

from prometheus_client import CollectorRegistry, make_wsgi_app

from ilqr_service import logs
from ilqr_service.settings import http_address
from ilqr_vae.errors import ServiceError


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Whoever asked is gone, most likely: a line in the log, not a traceback beside it."""
        logs.info("a web request broke", peer=str(client_address), error=repr(sys.exception()))


class _Handler(WSGIRequestHandler):
    timeout = 5

    def log_message(self, format: str, *args: object) -> None:
        """Scrapes are not news."""


class Web:
    """Serves the registry and two health checks until closed.

    Args:
        address: HOST:PORT; port 0 takes a free one.
        registry: what /metrics shows.
        healthy: whether the service's threads are alive (/healthz).
        ready: whether bins are answered (/readyz).

    Raises:
        ServiceError: the address is not one, or cannot be bound.
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
        metrics = make_wsgi_app(registry)
        checks = {"/healthz": healthy, "/readyz": ready}

        def app(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
            path = environ.get("PATH_INFO", "/")
            if path == "/metrics":
                return metrics(environ, start)
            check = checks.get(path)
            if check is None:
                status, body = "404 Not Found", "/metrics, /healthz, /readyz\n"
            elif check():
                status, body = "200 OK", "ok\n"
            else:
                status, body = "503 Service Unavailable", f"not {path[1:-1]}\n"
            start(status, [("Content-Type", "text/plain; charset=utf-8")])
            return [body.encode()]

        try:
            self._server = make_server(host, port, app, _Server, _Handler)
        except (OSError, OverflowError) as error:
            raise ServiceError(
                "http", expected="an address that can be bound", got=f"{address} ({error})"
            ) from error
        bound_host, bound_port = self._server.server_address[:2]
        self.address = f"{bound_host!s}:{bound_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="http"
        )
        self._thread.start()

    def close(self) -> None:
        """Stop answering and free the port."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
