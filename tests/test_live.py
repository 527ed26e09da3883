"""The live page: over HTTP, and in a real browser."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from browser import Browser, needs_chromium
from feeder import WAIT_S
from ilqr_clients.live.app import application
from ilqr_clients.live.feed import KEPT_BINS, Channel, LiveFeed
from ilqr_clients.sdk import ServiceClient, Session
from process import ENVIRONMENT, free_port, served
from rig import BIN_S, make_model

N_UNITS = 5
NAMES = tuple(f"u{i}" for i in range(N_UNITS))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(
        tmp_path_factory.mktemp("model") / "m.safetensors", n_units=N_UNITS, names=NAMES
    )


@contextmanager
def page(endpoint: str) -> Iterator[str]:
    """``ilqr-vae dashboard`` as a process; its address."""
    code = "from ilqr_clients.dashboard_cli import app; app()"
    command = [sys.executable, "-u", "-c", code, "--to", endpoint, "--http", "127.0.0.1:0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=ENVIRONMENT)
    assert process.stdout is not None
    try:
        said = process.stdout.readline().decode()
        yield next(word for word in said.split() if word.startswith("http://"))
    finally:
        process.terminate()
        assert process.wait(WAIT_S) is not None
        process.stdout.close()


def feed(session: Session, bins: range) -> None:
    counts = np.random.default_rng(0).poisson(1.0, (bins.stop, N_UNITS))
    for index in bins:
        session.step(index, counts[index], timeout=WAIT_S)


def opened(service: ServiceClient, name: str) -> Session:
    return service.open(name, units=NAMES, bin_width=BIN_S, deadline=10.0)


def text(name: str) -> str:
    """Of an element, as an expression."""
    return f"document.getElementById('{name}').textContent"


def answered(scope: dict[str, Any], **given: Any) -> tuple[int, dict[str, str], bytes]:
    """What the application answers to one request."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(dict(message))

    default = {"type": "http", "method": "GET", "query_string": b"", "headers": [], "path": "/"}
    app = application(LiveFeed("tcp://127.0.0.1:1"), **given)
    asyncio.run(app(default | {"raw_path": b"/", "root_path": ""} | scope, receive, send))
    headers = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
    return sent[0]["status"], headers, b"".join(m.get("body", b"") for m in sent[1:])


def test_nothing_is_shown_without_the_token_or_by_another_name() -> None:
    host = [(b"host", b"127.0.0.1:8080")]
    hosts = frozenset(("127.0.0.1",))
    status, headers, body = answered({"headers": host}, hosts=hosts)
    assert (status, b"<html" in body) == (200, True)
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert answered({"headers": [(b"host", b"evil.example:8080")]}, hosts=hosts)[0] == 400
    assert answered({}, token="secret")[0] == 403
    assert answered({"query_string": b"token=wrong"}, token="secret")[0] == 403
    assert answered({"query_string": b"token=secret"}, token="secret")[0] == 200
    assert answered({"path": "/../feed.py"})[0] == 404
    assert answered({"method": "POST"})[0] == 405  # there is nothing to change


def test_a_slow_viewer_misses_the_oldest_and_costs_no_memory() -> None:
    channel = Channel()
    for i in range(KEPT_BINS + 10):
        channel.add({"i": i})
    entries, position = channel.after(0)
    assert (len(entries), entries[0]["i"], position) == (KEPT_BINS, 10, KEPT_BINS + 10)
    assert channel.after(position) == ([], position)
    assert channel.after(position - 3)[0] == [{"i": KEPT_BINS + 7 + k} for k in range(3)]


@needs_chromium
def test_a_browser_sees_bins_faults_and_a_restart(model: Path, tmp_path: Path) -> None:
    port = free_port()
    with page(f"tcp://127.0.0.1:{port}") as address, Browser() as browser:
        browser.size(1400, 1400)
        browser.open(address)
        with (
            served(model, tmp_path / "first.log", port=port) as service,
            ServiceClient(service.ingest, timeout=WAIT_S) as client,
            opened(client, "rat-7") as session,
        ):
            feed(session, range(1))  # listened to within a second
            browser.wait("document.getElementById('session').value === 'rat-7'")
            browser.wait("live.bins() >= 1")
            feed(session, range(1, 60))
            browser.wait("live.newest().i === 59 && live.frames() > 1")
            browser.wait(f"{text('numbers')}.startsWith('bin 59')")
            with urllib.request.urlopen(f"{address}stream?session=rat-7") as other:
                piece = json.loads(other.readline().removeprefix(b"data: "))
            assert [one["i"] for one in piece["bins"]][-59:] == list(range(1, 60))
            session.step(63, np.ones(N_UNITS), timeout=WAIT_S)
            browser.wait(
                "document.getElementById('alarms').textContent.includes('missing from bin 60')"
            )
            browser.value("document.getElementById('pause').click()")
            feed(session, range(64, 66))
            browser.wait("live.newest().i === 65")
            browser.wait(f"{text('numbers')}.startsWith('bin 63')")
            browser.value("document.getElementById('pause').click()")
            browser.wait(f"{text('numbers')}.startsWith('bin 65')")
            for width in (1400, 390):
                browser.size(width, 1400)
                browser.wait(f"innerWidth === {width}")
                assert browser.value("document.documentElement.scrollWidth") <= width
                browser.picture(tmp_path / f"live-{width}.png")
            for width in ("0", "10px", "100%"):  # as while the page is laid out
                script = "document.querySelectorAll('canvas').forEach(c => c.style.width = '{}')"
                frames = browser.value("live.frames()")
                browser.value(script.format(width) + "; dispatchEvent(new Event('resize'))")
                browser.wait(f"live.frames() > {frames}")
            service.kill()
            browser.wait(f"{text('service')}.includes('no answer')")
        with (
            served(model, tmp_path / "second.log", port=port) as service,
            ServiceClient(service.ingest, timeout=WAIT_S) as client,
            opened(client, "rat-8") as session,
        ):
            feed(session, range(1))
            browser.wait("document.getElementById('session').value === 'rat-8'")
            feed(session, range(1, 20))
            browser.wait("live.newest() && live.newest().i === 19")
        assert browser.problems == []
        assert all(asked.startswith((address, "data:")) for asked in browser.asked)
