"""Child processes of the demo, one verb each; none outlives the demo."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import msgspec

from ilqr_vae.errors import IlqrVaeError
from ilqr_vae.terminal import STOP_SIGNALS

STOP_S = 15.0
"""Seconds that a child may take to stop before it is killed."""


class StepError(IlqrVaeError):
    """A step of the demo failed and printed why. The demo exits with the same code."""

    def __init__(self, step: str, code: int, *, said: str = "") -> None:
        super().__init__(step, expected="exit code 0", got=f"{code}{said}")
        self.exit_code = code if 0 < code < 126 else 1


class Interrupted(BaseException):
    """A signal that stops the demo.

    Attributes:
        number: number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def interruptible() -> Generator[None]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into ``Interrupted``, and ignore later ones.

    Later signals must not interrupt the stopping of the children, which takes at most ``STOP_S``
    for each. Only in the main thread; the previous handlers are restored.
    """

    def handle(number: int, _: FrameType | None) -> None:
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(number)

    before = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _deferred_signals() -> Generator[None]:
    """Defer signals to the end of the context.

    Used around the start of a child, which would be leaked if ``Popen`` were interrupted.
    """
    came: list[int] = []
    before = {n: signal.signal(n, lambda number, _: came.append(number)) for n in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


def command(arguments: Sequence[str]) -> list[str]:
    """Return the command line of a verb, run by this interpreter."""
    return [sys.executable, "-m", "ilqr_vae", *arguments]


def stop(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Ask a child to stop; kill it after ``STOP_S``."""
    if process.poll() is None:
        process.send_signal(number)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def _child(
    arguments: Sequence[str],
    asked: signal.Signals,
    *,
    stdout: int | None = None,
    stderr: BinaryIO | None = None,
) -> Generator[subprocess.Popen[bytes]]:
    """Run a verb as a child process for the duration of the context, then stop it.

    The child has its own process session: Ctrl-C reaches only the demo, which stops it.
    """
    process: subprocess.Popen[bytes] | None = None
    try:
        with _deferred_signals():
            process = subprocess.Popen(
                command(arguments),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        assert process is not None
        yield process
    finally:
        if process is not None:
            stop(process, asked)
            if process.stdout is not None:
                process.stdout.close()


def run(step: str, arguments: Sequence[str]) -> None:
    """Run a verb to its end, on this terminal.

    Raises:
        StepError: it ended with a nonzero exit code.
    """
    with _child(arguments, signal.SIGINT) as process:
        code = process.wait()
    if code != 0:
        raise StepError(step, code)


class Ready(msgspec.Struct, frozen=True):
    """The content that ``ilqr-vae serve --ready-file`` writes once it answers."""

    ingest: str
    results: str
    http: str
    model: str
    device: str
    pid: int


def serve_arguments(model: Path, realtime: int = 1) -> list[str]:
    """Return the verb and its options: free ports, and a line on standard output when ready.

    If permitted, its threads have priority over the browser that shows the live page.
    """
    free = "tcp://127.0.0.1:*"
    where = ["--ingest", free, "--results", free, "--http", "127.0.0.1:0"]
    return ["serve", str(model), *where, "--realtime", str(realtime), "--ready-file", "-"]


@contextmanager
def live_page(ingest: str, *, show: bool) -> Generator[str]:
    """Run ``ilqr-vae dashboard`` for the duration of the context; yield its address.

    The address is "" if it cannot start. Its failure does not stop the demo.

    Args:
        ingest: the service's address.
        show: whether to open it in a browser.
    """
    words = ["dashboard", "--to", ingest, "--http", "127.0.0.1:0", "--what-if"]
    with _child(
        [*words, *(["--open"] if show else [])], signal.SIGINT, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        said = process.stdout.readline().decode().split()
        yield next((word for word in said if word.startswith("http://")), "")


def _failed(code: int, log: Path, lines: int = 15) -> StepError:
    tail = log.read_text(errors="replace").splitlines()[-lines:]
    said = "".join(f"\n  {line}" for line in tail)
    return StepError("serve", code, said=f"; the end of {log}:{said}")


@contextmanager
def serving(
    model: Path,
    log: Path,
    *,
    waiting: AbstractContextManager[Any] | None = None,
    realtime: int = 1,
) -> Generator[Ready]:
    """Run ``ilqr-vae serve`` on free loopback ports for the duration of the context.

    Args:
        model: the model file.
        log: file for its log.
        waiting: context entered while it warms up, e.g. to show that.
        realtime: SCHED_FIFO priority of the service's threads; 0 for none.

    Raises:
        StepError: it could not start, or ended with an error; the message has the end of its log.
    """
    with (
        log.open("wb") as errors,
        _child(
            serve_arguments(model, realtime),
            signal.SIGTERM,
            stdout=subprocess.PIPE,
            stderr=errors,
        ) as process,
    ):
        assert process.stdout is not None
        with waiting or nullcontext():
            line = process.stdout.readline()  # empty if the service ended
        if not line:
            raise _failed(process.wait(), log)
        yield msgspec.json.decode(line, type=Ready)
    if process.returncode != 0:
        raise _failed(process.returncode, log)
