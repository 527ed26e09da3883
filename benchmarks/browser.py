"""A headless Chromium, controlled by its DevTools protocol over a pipe, without driver or port."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

_CODES = {"Tab": {"windowsVirtualKeyCode": 9}, "ArrowRight": {"windowsVirtualKeyCode": 39}}
IN_BACKGROUND = ("chrt", "--idle", "0")
"""Before a command: it runs when nothing else wants to, as a browser that ``dashboard --open``
starts."""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Browser:
    """One page. ``problems`` collects console errors, exceptions and refused requests; ``asked``
    the addresses requested; ``pid`` is of its first process."""

    def __init__(self, width: int = 1400, height: int = 1000, *, background: bool = False) -> None:
        assert CHROMIUM is not None
        self._folder = tempfile.TemporaryDirectory(prefix="chromium-")
        there, out = os.pipe()
        back, here = os.pipe()
        os.set_inheritable(there, True)
        os.set_inheritable(here, True)
        # the browser reads descriptor 3 and writes 4
        command = f'exec "$0" "$@" 3<&{there} 4>&{here}'
        arguments = [
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"),
            *("--no-first-run", "--disable-background-networking", "--disable-dev-shm-usage"),
            *(f"--user-data-dir={self._folder.name}", f"--window-size={width},{height}"),
        ]
        before = IN_BACKGROUND if background else ()
        self._process = subprocess.Popen(
            [*before, "bash", "-c", command, CHROMIUM, *arguments],
            pass_fds=(there, here),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.pid = self._process.pid
        os.close(there)
        os.close(here)
        self._out, self._back, self._left = out, back, b""
        self._number = 0
        self._session = ""
        self.problems: list[str] = []
        self.asked: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "Performance"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._out)
        os.close(self._back)
        self._folder.cleanup()

    def _message(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._left:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._back], [], [], left)[0]:
                raise TimeoutError("the browser does not answer")
            more = os.read(self._back, 1 << 20)
            if not more:
                raise ConnectionError("the browser has ended")
            self._left += more
        frame, _, self._left = self._left.partition(b"\0")
        return json.loads(frame)

    def call(self, method: str, *, timeout: float = 60.0, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its result; record events meanwhile."""
        self._number += 1
        sent: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            sent["sessionId"] = self._session
        os.write(self._out, json.dumps(sent).encode() + b"\0")
        until = time.monotonic() + timeout
        while True:
            message = self._message(until)
            if message.get("id") == self._number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self._note(message.get("method", ""), message.get("params", {}))

    def _note(self, method: str, parameters: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(parameters["exceptionDetails"])[:600])
        elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.problems.append(parameters["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and parameters["type"] == "error":
            self.problems.append(json.dumps(parameters["args"])[:300])
        elif method == "Network.requestWillBeSent":
            self.asked.append(parameters["request"]["url"])

    def open(self, address: str) -> None:
        """Open an address."""
        self.call("Page.navigate", url=address)

    def size(self, width: int, height: int) -> None:
        """Set the size of the window."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def value(self, expression: str) -> Any:
        """Evaluate a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["text"] + f" in {expression}")
        return found["result"].get("value")

    def wait(self, condition: str, timeout: float = 60.0) -> Any:
        """Wait until an expression is true; return its value."""
        until = time.monotonic() + timeout
        while not (found := self.value(condition)):
            if time.monotonic() > until:
                raise TimeoutError(f"{condition} did not come true")
            time.sleep(0.05)
        return found

    def press(self, key: str) -> None:
        """Press a key by its name, e.g. ``Tab``, ``ArrowRight``."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, **_CODES[key])

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Drag with the left button from one point of the page to another."""
        for kind, (x, y) in (
            ("mousePressed", start),
            ("mouseMoved", end),
            ("mouseReleased", end),
        ):
            button = {"button": "left", "buttons": 1, "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def picture(self, path: Path) -> None:
        """Return a PNG of the whole page."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
