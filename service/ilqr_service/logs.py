"""Logging to stderr: plain lines, or one JSON object per line."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import shutil
import sys
import textwrap
import time
from typing import Any, Literal

import msgspec

from ilqr_vae.terminal import visible

LOGGER = logging.getLogger("ilqr_service")


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, message, the record's ``extra["data"]``, traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        data = getattr(record, "data", None)
        if data:
            line["data"] = data
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


class PlainFormatter(logging.Formatter):
    """Time, level, message and the record's ``extra["data"]`` as key=value; tables below them.

    Args:
        width: width of a terminal to wrap lines to; None for no wrapping.
    """

    def __init__(self, width: int | None = None) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")
        self._width = width

    def format(self, record: logging.LogRecord) -> str:
        data: dict[str, Any] = getattr(record, "data", None) or {}
        first, newline, rest = super().format(record).partition("\n")
        pairs = " ".join(f"{k}={v}" for k, v in data.items() if not isinstance(v, dict))
        lines = [f"{first}  {visible(pairs)}" if pairs else first]
        for key, table in data.items():
            if isinstance(table, dict):
                lines += [f"  {visible(line)}" for line in _lines(key, table)]
        if self._width is not None:
            lines = [part for line in lines for part in self._wrapped(line, self._width)]
        return "\n".join(lines) + newline + rest

    def _wrapped(self, line: str, width: int) -> list[str]:
        return textwrap.wrap(
            line,
            width,
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )


def _lines(key: str, table: dict[str, Any]) -> list[str]:
    """Format a dict as ``key: name value, ...``; a dict of dicts as one such line each."""
    flat = ", ".join(f"{k} {v}" for k, v in table.items() if not isinstance(v, dict))
    made = [f"{key}: {flat}"] if flat else []
    for name, inner in table.items():
        if isinstance(inner, dict):
            made += _lines(f"{key}.{name}", inner)
    return made


class StderrHandler(logging.Handler):
    """Writes to a file descriptor without blocking: lines that its reader does not take are
    lost.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    def emit(self, record: logging.LogRecord) -> None:
        line = (self.format(record) + "\n").encode(errors="backslashreplace")
        with contextlib.suppress(OSError):
            for at in range(0, len(line), select.PIPE_BUF):
                if not self._poll.poll(0):
                    return
                os.write(self._descriptor, line[at : at + select.PIPE_BUF])


def configure(kind: Literal["plain", "json"], level: int = logging.INFO) -> None:
    """Send the log of the service to stderr only."""
    try:
        handler: logging.Handler = StderrHandler(sys.stderr.fileno())
    except (OSError, AttributeError):  # stderr is closed or not a file, or there is no select.poll
        handler = logging.StreamHandler(sys.stderr)
    width = shutil.get_terminal_size().columns if sys.stderr and sys.stderr.isatty() else None
    handler.setFormatter(JsonFormatter() if kind == "json" else PlainFormatter(width))
    LOGGER.handlers[:] = [handler]
    LOGGER.setLevel(level)
    LOGGER.propagate = False


def info(message: str, **data: Any) -> None:
    LOGGER.info(message, extra={"data": data})


def warning(message: str, **data: Any) -> None:
    LOGGER.warning(message, extra={"data": data})


def error(message: str, **data: Any) -> None:
    LOGGER.error(message, extra={"data": data})


def exception(message: str, **data: Any) -> None:
    """Log with the traceback of the exception being handled."""
    LOGGER.exception(message, extra={"data": data})


class Paced:
    """Rate limit for lines that any peer can cause: a burst, then one per second."""

    def __init__(self, at_once: int = 20) -> None:
        self._room, self._most, self._at, self._left_out = float(at_once), at_once, 0.0, 0

    def info(self, message: str, **data: Any) -> None:
        now = time.monotonic()
        passed, self._at = now - self._at, now
        self._room = min(self._most, self._room + passed)
        if self._room < 1:
            self._left_out += 1
            return
        self._room -= 1
        if self._left_out:
            data["lines_left_out"], self._left_out = self._left_out, 0
        info(message, **data)
