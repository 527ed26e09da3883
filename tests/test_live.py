"""The live page: over HTTP, and in a real browser."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.browser import Browser
from PIL import Image
from starlette.types import ASGIApp

from browser import needs_chromium
from feeder import WAIT_S
from ilqr_clients.live.app import application
from ilqr_clients.live.buffer import KEPT, SessionBuffer, SteeringEvent
from ilqr_clients.live.feed import LiveFeed
from ilqr_clients.sdk import ServiceClient, Session
from ilqr_training.evaluation.baselines import fit_rivals
from ilqr_vae.errors import ConfigError
from ilqr_vae.recordings import load_recording
from process import ENVIRONMENT, free_port, served
from rig import BIN_S, SPLIT, make_model, serving, spec, until, write_recording

N_UNITS = 5
NAMES = tuple(f"u{i}" for i in range(N_UNITS))
OTHERS = tuple(f"<img src=x{i}>" for i in range(7))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    return make_model(path, n_units=N_UNITS, names=NAMES, classes=("<b>left</b>", "right"))


@contextmanager
def page(endpoint: str, *options: str, http: str = "127.0.0.1:0") -> Iterator[str]:
    """``ilqr-vae dashboard`` as a process; its address."""
    code = "from ilqr_clients.dashboard_cli import app; app()"
    command = [sys.executable, "-u", "-c", code, "--to", endpoint, "--http", http, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=ENVIRONMENT)
    assert process.stdout is not None
    try:
        said = process.stdout.readline().decode()
        yield next(word for word in said.split() if word.startswith("http://"))
    finally:
        process.terminate()
        assert process.wait(WAIT_S) is not None
        process.stdout.close()


@contextmanager
def verb(name: str, *options: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """A verb as a process, stopped at the end."""
    command = [sys.executable, "-m", "ilqr_vae.cli", name, *map(str, options)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(WAIT_S)


def feed(session: Session, bins: range, n_units: int = N_UNITS) -> None:
    counts = np.random.default_rng(0).poisson(1.0, (bins.stop, n_units))
    for index in bins:
        session.step(index, counts[index], timeout=WAIT_S)


def opened(service: ServiceClient, name: str, names: tuple[str, ...] = NAMES) -> Session:
    return service.open(name, units=names, bin_width=BIN_S, deadline=10.0)


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


def posted(app: ASGIApp, body: bytes, **headers: str) -> int:
    """The status that the application answers a request to steer with."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(dict(message))

    named = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/steer", "raw_path": b"/steer"}
    asyncio.run(
        app(scope | {"root_path": "", "query_string": b"", "headers": named}, receive, send)
    )
    return sent[0]["status"]


def test_only_this_page_steers_and_only_where_it_may() -> None:
    body = json.dumps({"session": "s", "change": {"silent": 0.5}}).encode()
    json_type = {"content_type": "application/json", "host": "127.0.0.1:1"}
    mine, others = {"origin": "http://127.0.0.1:1"}, {"origin": "http://evil.example"}
    app = application(LiveFeed("tcp://127.0.0.1:1", what_if=True))
    assert posted(app, body, **json_type, **mine) == 409  # no such session
    assert posted(app, body, **json_type, **others) == 403
    assert posted(app, body, content_type="text/plain", host="127.0.0.1:1") == 415
    assert posted(app, b"[" * 9000, **json_type) == 413
    assert posted(app, b"{]", **json_type) == 409
    read_only = application(LiveFeed("tcp://127.0.0.1:1"))
    assert posted(read_only, body, **json_type, **mine) == 405
    run = {"kind": "replay", "paused": False, "loop": False, "position": 0.0, "length": 1.0}
    run |= {"decoder": "", "decoders": [], "disturbance": {}, "secret": "s"}
    feed = LiveFeed("tcp://127.0.0.1:1", what_if=True)
    elsewhere = SteeringEvent(**(run | {"address": "tcp://192.0.2.1:1"}))
    feed.channels["s"] = SessionBuffer(run=(elsewhere, time.monotonic()))
    with pytest.raises(ConfigError, match="a run on this machine"):
        feed.steer("s", {})


def test_alarms_have_numbers_that_a_browser_tells_apart() -> None:
    feed = LiveFeed("tcp://127.0.0.1:1")
    for k in range(3):
        feed._alarm("notice", str(k))
    assert len({float(one["n"]) for one in feed.alarms}) == 3


def turns_by_keys_and_by_hand(browser: Browser) -> None:
    """Tab visits every tool in the order of the page; then the latents are turned."""
    tools = "[...document.querySelectorAll('input, select, button, [tabindex]')]"
    seen = "e.getClientRects().length && !e.disabled"
    order = browser.value(f"{tools}.filter((e) => {seen}).map((e) => e.id)")
    assert order.index("session") < order.index("pca") < order.index("alarms")
    browser.value("document.activeElement.blur(); scrollTo(0, 0)")
    visited: list[str] = []
    for _ in order:
        browser.press("Tab")
        visited.append(browser.value("document.activeElement.id"))
    assert visited == order
    browser.value("document.getElementById('pca').focus()")
    browser.press("ArrowRight")
    yaw, pitch = browser.value("live.turned()")
    browser.press("ArrowRight")
    assert browser.value("live.turned()") == pytest.approx([yaw + 0.15, pitch])
    place = "(() => { const e = document.getElementById('pca'); e.scrollIntoView(); "
    place += (
        "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
    )
    x, y = browser.value(place)
    browser.drag((x, y), (x + 60, y + 12))
    assert browser.value("live.turned()") == pytest.approx([yaw + 0.65, pitch + 0.1])


def saves_what_it_shows(browser: Browser, folder: Path) -> None:
    """The two buttons write a table and a picture."""
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    for button, ending in (("csv", ".csv"), ("png", ".png")):
        browser.value(f"document.getElementById('{button}').click()")
        until(ending, lambda ending=ending: list(folder.glob(f"*{ending}")))
    (table,), (drawn,) = folder.glob("*.csv"), folder.glob("*.png")
    assert len({line.count(",") for line in table.read_text().splitlines()}) == 1
    with Image.open(drawn) as picture:
        colours = picture.convert("RGB").getcolors(1 << 24)
        assert picture.height > 1000
        assert colours is not None
        assert len(colours) > 50


def pictures(browser: Browser, bins_a_second: float, seconds: float = 1.0) -> int:
    """How many pictures the page draws in so many seconds of a browser that asks for 60 a second,
    while bins come at a rate; none come where the rate is 0. Time is made up: nothing waits."""
    script = """
        const before = live.frames(), start = performance.now() + 5000;
        let due = 0;
        for (let k = 0; k < 60 * SECONDS; k++) {
            const log = [], now = start + (k * 1000) / 60;
            for (due += RATE / 60; due >= 1; due -= 1)
                log.push({ b: { ...live.newest(), i: live.newest().i + 1 + log.length } });
            if (log.length) live.hear({ log }, now);
            live.frame(now);
        }
        return live.frames() - before;"""
    script = script.replace("RATE", str(bins_a_second)).replace("SECONDS", str(seconds))
    return browser.value(f"(() => {{ {script} }})()")


def draws_thirty_pictures_a_second_while_bins_come(browser: Browser) -> None:
    for rate in (20, 100, 200):
        assert 30 <= pictures(browser, rate) <= 40
    pictures(browser, 0, 2)  # up to the newest bin
    assert pictures(browser, 0) == 0


def costs_nothing_while_nobody_sees_it(browser: Browser, session: Session, bins: range) -> None:
    """A page in a tab that is hidden takes no part; shown again it has what came meanwhile."""
    hide = "Object.defineProperty(document, 'hidden', {{ value: {}, configurable: true }}); "
    hide += "document.dispatchEvent(new Event('visibilitychange'))"
    before = browser.value("live.bins()")
    browser.value(hide.format("true"))
    feed(session, bins)
    assert browser.value("live.bins()") == before
    browser.value(hide.format("false"))
    browser.wait(f"live.newest() && live.newest().i === {bins.stop - 1}")


@needs_chromium
def test_a_person_steers_a_closed_loop_from_a_page_with_a_token(tmp_path: Path) -> None:
    names = tuple(f"unit{i:03d}" for i in range(N_UNITS))
    model = make_model(tmp_path / "m.safetensors", n_units=N_UNITS, names=names)
    recording = load_recording(write_recording(tmp_path / "r.mat", n_units=N_UNITS), spec())
    rivals = replace(fit_rivals(recording, SPLIT, steps=2), unit_names=names)
    rivals.save(tmp_path / "rivals.npz")
    options = ("--units", N_UNITS, "--trials", 0, "--rivals", tmp_path / "rivals.npz")
    with (
        serving(model) as service,
        page(service.ingest, "--what-if", http="0.0.0.0:0") as address,
        Browser() as browser,
        Browser() as other,
        verb("closed-loop", "--to", service.ingest, "--steer", "tcp://127.0.0.1:*", *options),
    ):
        assert "?token=" in address
        address = address.replace("0.0.0.0", "127.0.0.1")
        for one in (browser, other):
            one.size(1400, 1400)
            one.open(address)
            one.wait("window.live && live.bins() > 20 && !document.getElementById('whatif').hidden")
        browser.wait("document.getElementById('score-rows').children.length === 3")
        for name in ("truth", "cursor", "target", "c", "u"):
            browser.wait(f"live.state().bins.some((b) => b.{name})")
        assert browser.value("live.csv()").startswith('bin,status,"vx","vx std","vy",')
        move = "{{ const s = document.getElementById('{}'); s.value = '{}'; {} }}"
        fire = "s.dispatchEvent(new Event('{}', {{ bubbles: true }}))"
        browser.value(move.format("if-silent", 60, fire.format("input")))
        silent = "live.state().state.sessions[0].run.disturbance.silent"
        other.wait(f"{silent} === 0.6")
        browser.value(move.format("run-decoder", "GRU", fire.format("change")))
        other.wait("document.getElementById('run-decoder').value === 'GRU'")
        browser.value(move.format("sort", "direction", fire.format("change")))
        browser.value("document.getElementById('run-reset').click()")
        other.wait(f"{silent} === 0")
        turns_by_keys_and_by_hand(browser)
        saves_what_it_shows(browser, tmp_path)
        for width in (1400, 390):
            browser.size(width, 1400)
            browser.wait(f"innerWidth === {width}")
            assert browser.value("document.documentElement.scrollWidth") <= width
        every = "[...document.querySelectorAll('input, select, button, canvas')]"
        named = "(e.labels && e.labels.length) || e.textContent.trim()"
        named += " || e.closest('[role=img]')?.ariaLabel"
        assert browser.value(f"{every}.filter((e) => !({named})).map((e) => e.id)") == []
        assert browser.problems == other.problems == []


def test_a_slow_viewer_misses_the_oldest_and_costs_no_memory() -> None:
    channel = SessionBuffer()
    for i in range(KEPT + 10):
        channel.add({"i": i})
    entries, position = channel.after(0)
    assert (len(entries), json.loads(entries[0])["i"], position) == (KEPT, 10, KEPT + 10)
    assert channel.after(position) == ([], position)
    some, position = channel.after(position - 3, 2)
    assert [json.loads(one)["i"] for one in some] == [KEPT + 7, KEPT + 8]
    assert position == KEPT + 9
    channel.most = 1000
    channel.add({"i": 0})
    assert channel.size == sum(map(len, channel.entries)) <= 1000


@needs_chromium
def test_a_browser_sees_bins_faults_and_a_restart(model: Path, tmp_path: Path) -> None:
    port = free_port()
    second = make_model(tmp_path / "other.safetensors", n_units=len(OTHERS), names=OTHERS)
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
            browser.wait(f"{text('numbers')}.includes('bin 59')")
            with urllib.request.urlopen(f"{address}stream?session=rat-7") as other:
                piece = json.loads(other.readline().removeprefix(b"data: "))
            bins = [one["b"]["i"] for one in piece["log"] if "b" in one]
            assert bins[-59:] == list(range(1, 60))
            browser.wait("live.newest().c && live.newest().c.length === 5")  # its counts
            browser.wait(f"/Answered: (<b>left|right)/.test({text('classes-note')})")
            assert client.event("rat-7", "reward", {"drops": 2})
            browser.wait(f"{text('events')}.includes('reward: drops 2')")
            costs_nothing_while_nobody_sees_it(browser, session, range(60, 63))
            browser.wait(f"{text('events')}.includes('reward: drops 2')")
            assert browser.value("document.getElementById('events').children.length") == 1
            session.step(66, np.ones(N_UNITS), timeout=WAIT_S)
            browser.wait(f"{text('alarms')}.includes('missing from bin 63')")
            browser.wait(f"{text('numbers')}.includes('bin 66')")
            browser.value("document.getElementById('pause').click()")
            feed(session, range(67, 69))
            browser.wait("live.newest().i === 68")
            browser.wait(f"{text('numbers')}.includes('bin 66')")
            browser.value("document.getElementById('pause').click()")
            browser.wait(f"{text('numbers')}.includes('bin 68')")
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
            served(second, tmp_path / "second.log", port=port) as service,
            ServiceClient(service.ingest, timeout=WAIT_S) as client,
            opened(client, "rat-8", OTHERS) as session,
        ):
            feed(session, range(1), len(OTHERS))
            browser.wait("document.getElementById('session').value === 'rat-8'")
            feed(session, range(1, 20), len(OTHERS))
            browser.wait("live.newest() && live.newest().i === 19 && live.newest().r.length === 7")
            browser.wait("document.getElementById('classes-card').hidden")
            browser.wait(f"{text('numbers')}.includes('bin 19')")
            draws_thirty_pictures_a_second_while_bins_come(browser)
        assert browser.problems == []
        assert all(asked.startswith((address, "data:")) for asked in browser.asked)
