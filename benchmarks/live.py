"""The live page: its cost, its memory over time, and a picture of it.

    python -m benchmarks.live latency DEMO     service latency without and with the page
    python -m benchmarks.live memory DEMO      memory of the page and of its server, 10 minutes
    python -m benchmarks.live picture DEMO --out docs/live.webp

DEMO is the folder that ``make demo`` wrote. Chromium is required.
"""

from __future__ import annotations

import argparse
import base64
import io
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
from PIL import Image

from benchmarks.browser import Browser
from ilqr_clients.load import Generator
from ilqr_clients.load_schedule import Faults, LoadSize
from ilqr_vae.commands.children import serving

CONDITIONS = ("no page", "page open", "viewer that stalls")
_ENVIRONMENT = os.environ | {"PYTHONUNBUFFERED": "1"}


@contextmanager
def _verb(*words: str | Path, niceness: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    """Run a verb as a process, with a pipe for its standard output."""
    command = ["nice", "-n", str(niceness), sys.executable, "-m", "ilqr_vae.cli", *map(str, words)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=_ENVIRONMENT
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


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


def latency(ingest: str, rounds: int, seconds: float, speed: float) -> dict[str, Any]:
    """Measure the service latency in ms by condition, interleaved, and frames per second."""
    times: dict[str, list[float]] = defaultdict(list)
    frames: list[float] = []
    for _, condition in itertools.product(range(rounds), CONDITIONS):
        with ExitStack() as stack:
            browser: Browser | None = None
            if condition != "no page":
                address, _ = stack.enter_context(_page(ingest))
                if condition == "page open":
                    browser = stack.enter_context(Browser(niceness=5))
                    browser.open(address)
                    browser.wait("window.live")
                else:
                    stack.enter_context(_stalled(address))
            bins = round(seconds * speed / 0.05)
            load = LoadSize(bins=bins, warm_up=round(speed / 0.05), speed=speed)
            with Generator(ingest, load, Faults()) as generator:
                generator.open()
                began, before = time.monotonic(), browser.value("live.frames()") if browser else 0
                found = generator.run().stamps
                if browser is not None:
                    drawn = browser.value("live.frames()") - before
                    frames.append(drawn / (time.monotonic() - began))
            times[condition] += [(s.published - s.received) / 1e6 for s in found]
    quantiles = {
        name: {f"p{q:g}": float(np.percentile(values, q)) for q in (50, 99)} | {"n": len(values)}
        for name, values in times.items()
    }
    base = quantiles[CONDITIONS[0]]["p99"]
    return {
        "latency_ms": quantiles,
        "p99_ratio": {name: found["p99"] / base for name, found in quantiles.items()},
        "frames_per_second": frames,
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
    parser.add_argument("--rounds", type=int, default=4, help="of latency")
    parser.add_argument("--seconds", type=float, default=12.0, help="of a round, or of the picture")
    parser.add_argument(
        "--speed", type=float, default=5.0, help="of latency: 5 is 100 bins a second"
    )
    parser.add_argument("--out", type=Path, default=Path("live.webp"), help="of the picture")
    parser.add_argument("--json", type=Path, help="where the figures go")
    given = parser.parse_args()
    with serving(given.demo / "model.safetensors", given.demo / "live.log") as ready:
        if given.what == "latency":
            found = latency(ready.ingest, given.rounds, given.seconds, given.speed)
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
