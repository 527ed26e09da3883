"""The live page: its cost, its memory over time, and a picture of it.

    python -m benchmarks.live latency DEMO     what the page costs the service; under 6 minutes
    python -m benchmarks.live memory DEMO      memory of the page and of its server, 10 minutes
    python -m benchmarks.live picture DEMO --out docs/live.webp

DEMO is the folder that ``make demo`` wrote. Chromium is required.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image

from benchmarks.browser import IN_BACKGROUND, Browser
from ilqr_clients.load import Generator
from ilqr_clients.load_schedule import Faults, LoadSize
from ilqr_vae.commands.children import serving

CONDITIONS = ("no page", "page open", "viewer that stalls", "another program")
_ENVIRONMENT = os.environ | {"PYTHONUNBUFFERED": "1"}
_RESAMPLES = 4000
_BUSY = """
import sys, time
share, began = float(sys.argv[1]), time.monotonic()
for turn in range(sys.maxsize):
    until = time.thread_time() + share / 32
    while time.thread_time() < until:
        pass
    time.sleep(max(0.0, began + (turn + 1) / 32 - time.monotonic()))
"""
"""A program that takes a share of a core, 32 times a second a part of it."""


@contextmanager
def _process(*command: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process, its standard output in a pipe."""
    process = subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=_ENVIRONMENT
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def _verb(*words: str | Path) -> AbstractContextManager[subprocess.Popen[bytes]]:
    return _process(sys.executable, "-m", "ilqr_vae.cli", *words)


@contextmanager
def _page(ingest: str) -> Iterator[tuple[str, int]]:
    """Serve the page: its address, and the process."""
    words = ("dashboard", "--to", ingest, "--http", "127.0.0.1:0", "--what-if")
    with _verb(*words) as process:
        assert process.stdout is not None
        said = process.stdout.readline().decode().split()
        yield next(word for word in said if word.startswith("http://")), process.pid


def _stalled(address: str) -> socket.socket:
    """Open a viewer that requests the stream and never reads it."""
    at = urlsplit(address)
    viewer = socket.create_connection((str(at.hostname), int(at.port or 80)))
    viewer.sendall(f"GET /stream?session=load-0 HTTP/1.1\r\nHost: {at.netloc}\r\n\r\n".encode())
    return viewer


def _spent(process: psutil.Process) -> float:
    """Seconds of processor time of a process and what it started."""
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(t.user + t.system for t in times)


class _Rounds:
    """Rounds of all conditions.

    Attributes:
        times: milliseconds from a bin's arrival in the service to its answer: an array a round.
        frames: pictures a second that the page drew; shares: of a core that the browser took.
    """

    def __init__(self, ingest: str, seconds: float, speed: float, *, background: bool) -> None:
        self._ingest, self._speed, self._background = ingest, speed, background
        self._load = LoadSize(
            bins=round((seconds + 1) * speed / 0.05), warm_up=round(speed / 0.05), speed=speed
        )
        self.times: dict[str, list[NDArray[np.float64]]] = defaultdict(list)
        self.frames: list[float] = []
        self.shares: list[float] = []

    def run(self, condition: str) -> None:
        """One block of a condition."""
        with ExitStack() as stack:
            browser: Browser | None = None
            if condition in CONDITIONS[1:3]:
                address, _ = stack.enter_context(_page(self._ingest))
                if condition == "page open":
                    browser = stack.enter_context(Browser(background=self._background))
                    browser.open(address)
                    browser.wait("window.live")
                else:
                    stack.enter_context(_stalled(address))
            elif condition == "another program":
                behind = IN_BACKGROUND if self._background else ()
                busy = (sys.executable, "-c", _BUSY, f"{self.shares[-1]:.3f}")
                stack.enter_context(_process(*behind, *busy))
            with Generator(self._ingest, self._load, Faults()) as generator:
                generator.open()
                began, before = time.monotonic(), self._of(browser)
                found = generator.run().stamps
                took, after = time.monotonic() - began, self._of(browser)
            if browser is not None:
                self.frames.append((after[0] - before[0]) / took)
                self.shares.append((after[1] - before[1]) / took)
        spent = [(s.published - s.received) / 1e6 for s in found]
        self.times[condition].append(np.array(spent))

    def _of(self, browser: Browser | None) -> tuple[float, float]:
        if browser is None:
            return 0.0, 0.0
        return browser.value("live.frames()"), _spent(psutil.Process(browser.pid))

    def ratio(self, condition: str, quantile: float) -> dict[str, Any]:
        """A quantile over that of the first condition; its 95 % interval: rounds resampled."""
        rng = np.random.default_rng(0)
        here, base = self.times[condition], self.times[CONDITIONS[0]]

        def of(rounds: Iterable[int]) -> float:
            chosen = list(rounds)
            parts = (np.concatenate([kind[k] for k in chosen]) for kind in (here, base))
            with_it, without = (float(np.percentile(part, quantile)) for part in parts)
            return with_it / without

        n = len(base)
        drawn = [of(rng.integers(n, size=n)) for _ in range(_RESAMPLES)]
        low, high = np.percentile(drawn, (2.5, 97.5))
        each = [of([k]) for k in range(n)]
        return {"ratio": of(range(n)), "interval": [float(low), float(high)], "rounds": each}


def latency(
    ingest: str, rounds: int, seconds: float, speed: float, *, background: bool
) -> dict[str, Any]:
    """What a page costs the service: its own times of a bin in rounds of all conditions, in turns
    forward and backward. The last condition is a program that takes as much of a core as the
    browser did and knows nothing of the service."""
    found = _Rounds(ingest, seconds, speed, background=background)
    for k in range(rounds):
        for condition in CONDITIONS if k % 2 == 0 else CONDITIONS[::-1]:
            found.run(condition)
    pooled = {name: np.concatenate(parts) for name, parts in found.times.items()}
    return {
        "milliseconds": {
            name: {f"p{q:g}": float(np.percentile(v, q)) for q in (50, 99)} | {"n": len(v)}
            for name, v in pooled.items()
        },
        "p99": {name: found.ratio(name, 99) for name in CONDITIONS[1:]},
        "p50": {name: found.ratio(name, 50) for name in CONDITIONS[1:]},
        "frames_per_second": found.frames,
        "share_of_a_core": found.shares,
        "load_average": os.getloadavg()[0],
    }


def memory(ingest: str, demo: Path, minutes: float) -> dict[str, Any]:
    """Measure megabytes of the page (after garbage collection) and of its server."""
    samples: list[dict[str, float]] = []
    replay = ("replay", demo / "session.nwb", "--to", ingest, "--loop", "--span", "all")
    with (
        _page(ingest) as (address, pid),
        Browser() as browser,
        _verb(*replay, "--steer", "tcp://127.0.0.1:*", "--rivals", demo / "rivals.npz"),
    ):
        server = psutil.Process(pid)
        browser.open(address)
        browser.wait("window.live && live.bins() > 20")
        began = time.monotonic()
        while (passed := time.monotonic() - began) < 60 * minutes:
            browser.call("HeapProfiler.collectGarbage")
            heap = browser.call("Runtime.getHeapUsage")["usedSize"]
            dom = {m["name"]: m["value"] for m in browser.call("Performance.getMetrics")["metrics"]}
            samples.append(
                {
                    "s": round(passed),
                    "page_mb": heap / 1e6,
                    "nodes": dom["Nodes"],
                    "server_mb": server.memory_info().rss / 1e6,
                    "bins": browser.value("live.bins()"),
                    "frames": browser.value("live.frames()"),
                }
            )
            print(samples[-1], flush=True)
            time.sleep(min(30.0, 60 * minutes / 4))
        problems = browser.problems
    return {"samples": samples, "problems": problems}


def picture(ingest: str, demo: Path, out: Path, seconds: float) -> dict[str, Any]:
    """Record an animation of the page while units fall silent, if possible below 2 MB."""
    frames: list[Image.Image] = []
    replay = ("replay", demo / "session.nwb", "--to", ingest, "--loop", "--watch-units")
    with (
        _page(ingest) as (address, _),
        Browser() as browser,
        _verb(*replay, "--steer", "tcp://127.0.0.1:*", "--rivals", demo / "rivals.npz"),
    ):
        browser.size(1400, 1240)
        browser.open(address)
        browser.wait("window.live && live.bins() > 400")
        browser.wait("!document.getElementById('whatif').hidden")
        silence = "const s = document.getElementById('if-silent'); s.value = 45; "
        began = time.monotonic()
        silenced = False
        while (passed := time.monotonic() - began) < seconds:
            if not silenced and passed > seconds / 4:
                silenced = True
                browser.value(silence + "s.dispatchEvent(new Event('input'))")
            shot = browser.call("Page.captureScreenshot", format="jpeg", quality=90)
            image = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
            frames.append(image.resize((900, 797), Image.Resampling.LANCZOS))
            time.sleep(max(0.0, began + len(frames) * 0.2 - time.monotonic()))
    for quality in (70, 50, 35, 20):
        frames[0].save(
            out, save_all=True, append_images=frames[1:], duration=200, loop=0, quality=quality
        )
        if out.stat().st_size < 2e6:
            break
    return {"frames": len(frames), "bytes": out.stat().st_size, "quality": quality}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.live", description=__doc__)
    parser.add_argument("what", choices=("latency", "memory", "picture"))
    parser.add_argument("demo", type=Path, help="the folder that make demo has written")
    parser.add_argument("--minutes", type=float, default=10.0, help="of memory")
    parser.add_argument("--rounds", type=int, default=8, help="of latency")
    parser.add_argument("--seconds", type=float, default=8.0, help="of a block, or of the picture")
    parser.add_argument(
        "--speed", type=float, default=5.0, help="of latency: 5 is 100 bins a second"
    )
    parser.add_argument(
        "--realtime", type=int, default=1, help="of the service; 1 is what the demo asks for"
    )
    parser.add_argument(
        "--by-hand",
        action="store_true",
        help="a browser of normal priority, not one that dashboard --open starts",
    )
    parser.add_argument("--out", type=Path, default=Path("live.webp"), help="of the picture")
    parser.add_argument("--json", type=Path, help="where the figures go")
    given = parser.parse_args()
    served = given.demo / "model.safetensors", given.demo / "live.log"
    with serving(*served, realtime=given.realtime) as ready:
        if given.what == "latency":
            size = given.rounds, given.seconds, given.speed
            found = latency(ready.ingest, *size, background=not given.by_hand)
        elif given.what == "memory":
            found = memory(ready.ingest, given.demo, given.minutes)
        else:
            found = picture(ready.ingest, given.demo, given.out, given.seconds)
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({k: v for k, v in found.items() if k != "samples"}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
