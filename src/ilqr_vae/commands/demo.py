"""``ilqr-vae demo``: the whole chain in one command; each step is a verb."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Generator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ilqr_vae.commands.children import (
    Interrupted,
    interruptible,
    live_page,
    run,
    serve_arguments,
    serving,
)
from ilqr_vae.errors import ConfigError, RecordingError
from ilqr_vae.files import check_folder
from ilqr_vae.recordings.checks import missing_extra
from ilqr_vae.report.table import (
    Section,
    latency_table,
    number,
    scores_table,
    show,
    show_sections,
)
from ilqr_vae.simulated.centre_out import FEWEST_SUCCESSES
from ilqr_vae.terminal import console, has_browser

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

EXAMPLE = "Example: ilqr-vae demo configs/demo.toml --out demo-out --speed 4"

STAGES = ("solve", "total")
"""Latencies in the summary."""


class Chain:
    """Runs the steps one after another, and prints the command of each.

    Args:
        out: folder for all results.
        recording: recording to decode; None to simulate one.
        live: whether to show the live page, and fit rivals to decode beside the model.
        stay: whether to continue to replay at the end, until Ctrl-C.
    """

    def __init__(
        self,
        console: Console,
        out: Path,
        recording: Path | None,
        *,
        live: bool = False,
        stay: bool = False,
    ) -> None:
        self.console, self.out, self.live, self.stay = console, out, live, stay
        self.recording = recording or out / "session.nwb"
        self.model, self.log = out / "model.safetensors", out / "service.log"
        self.report, self.page = out / "report.json", out / "report.html"
        self.loop, self.picture = out / "closed-loop.json", out / "demo.png"
        self.rivals = out / "rivals.npz"
        self._number = itertools.count(1)

    def clear(self) -> None:
        """Remove the results of an earlier run."""
        for path in (self.report, self.page, self.loop, self.picture, self.rivals):
            path.unlink(missing_ok=True)

    def make_folder(self) -> None:
        """Create the folder. Raises ConfigError if that fails."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                "--out", expected="a folder that can be made", got=f"{self.out} ({error.strerror})"
            ) from error

    def say(self, what: str, words: list[str]) -> None:
        """Announce a step."""
        self.console.print()
        self.console.print(f"{next(self._number)}  {what}", style="bold cyan")
        self.console.print(f"$ ilqr-vae {shlex.join(words)}", style="dim", soft_wrap=True)

    def step(self, what: str, *arguments: str | Path) -> None:
        """Announce a verb and run it to its end. Raises StepError."""
        words = [str(a) for a in arguments]
        self.say(what, words)
        run(words[0], words)

    def simulate(self, minutes: float, units: int) -> None:
        self.step(
            "Simulate a reaching session",
            *("simulate", "--out", self.recording, "--minutes", f"{minutes:g}"),
            *("--units", str(units), "--force"),
        )

    def check(self, config: Path, steps: int | None) -> None:
        """Let ``train`` check its configuration before the first step. Raises StepError."""
        run("train", [str(a) for a in (*self._training(config, steps), "--check")])

    def train(self, config: Path, steps: int | None) -> None:
        words = (*self._training(config, steps), "--recording", self.recording)
        self.step("Train on its first part", *words)

    def _training(self, config: Path, steps: int | None) -> list[str | Path]:
        return [
            *("train", config, "--out", self.model),
            "--no-baselines",  # the report of the replay has one
            *(("--rivals", self.rivals) if self.live else ()),
            *(() if steps is None else ("--steps", str(steps))),
        ]

    def serve_and_stream(self, speed: str, units: int, reaches: int) -> None:
        """Serve in a separate process, stream the held-out part, then close the loop."""
        self.say("Serve the model, as a process of its own", serve_arguments(self.model))
        warming = self.console.status(
            "warming up; a first start compiles its kernels, a minute or two"
        )
        with serving(self.model, self.log, waiting=warming) as ready:
            self.console.print(
                f"ready on {ready.ingest}: model {ready.model}, device {ready.device}, process "
                f"{ready.pid}",
                soft_wrap=True,
            )
            with self._page(ready.ingest) as seen:
                self._stream(ready.ingest, speed, units, reaches, seen=seen)
        self.console.print()
        self.console.print("service stopped")

    @contextmanager
    def _page(self, ingest: str) -> Generator[bool]:
        """Show the live page, if enabled; yield whether it is visible."""
        if not self.live:
            yield False
            return
        seen = has_browser()
        with live_page(ingest, show=seen) as address:
            self.console.print(f"watch it live, and let things go wrong: {address}", soft_wrap=True)
            yield seen and bool(address)

    def _stream(self, ingest: str, speed: str, units: int, reaches: int, *, seen: bool) -> None:
        steered: list[str | Path] = []
        if self.live:
            steered = ["--watch-units", "--steer", "tcp://127.0.0.1:*"]
            steered += ["--rivals", self.rivals] if self.rivals.exists() else []
        pace = "as fast as it answers" if speed == "max" else f"at {speed} x real time"
        replay = ("replay", self.recording, "--to", ingest)
        self.step(
            f"Stream the held-out part through it, bin by bin, {pace}",
            *(*replay, "--speed", speed, "--span", "test"),
            *("--json", self.report, "--html", self.page, "--picture", self.picture),
            *steered,
        )
        if reaches:
            self.step(
                "Close the loop: the subject moves a cursor with what is decoded",
                *("closed-loop", "--to", ingest, "--trials", str(reaches)),
                *("--units", str(units), "--speed", "4" if seen else "max"),
                *("--json", self.loop, "--add-to", self.page, *steered),
            )
        if self.stay:
            self.conclude()
            what = "Replay it again and again, until Ctrl-C"
            self.step(what, *replay, "--span", "test", "--loop", *steered)

    def conclude(self) -> None:
        """Print the results again, and where they are."""
        report = json.loads(self.report.read_text())
        loop = json.loads(self.loop.read_text()) if self.loop.exists() else None
        self.console.print()
        self.console.print(f"{report['title']}, held-out part", style="bold")
        summary(report, loop, self.console)
        self.console.print()
        for path in (self.page, self.picture, self.report, self.loop, self.model, self.log):
            if path.exists():
                self.console.print(f"  {path}", soft_wrap=True)


def _check(config: Path, recording: Path | None, out: Path, speed: str) -> None:
    """Check the arguments before minutes are spent. Raises ConfigError, RecordingError."""
    number = re.fullmatch(r"\d+(\.\d*)?|\.\d+", speed)
    if speed != "max" and not (number and float(speed) > 0):
        raise ConfigError("--speed", expected="a number above zero, or max", got=repr(speed))
    if not config.is_file():
        raise ConfigError("config", expected="a TOML file, see configs/", got=str(config))
    needed = {"jinja2": "report", "matplotlib": "report"}
    if recording is None or recording.suffix.lower() == ".nwb":
        needed |= {"pynwb": "nwb"}
    if recording is not None and not (
        recording.is_file() and recording.suffix.lower() in (".nwb", ".mat")
    ):  # the formats that ``replay`` can stream
        raise RecordingError("--recording", expected="a .nwb or .mat file", got=str(recording))
    for package, extra in needed.items():
        if find_spec(package) is None:
            raise missing_extra("demo", package, extra)
    check_folder(out, "--out")


def summary(report: dict[str, Any], loop: dict[str, Any] | None, screen: Console) -> None:
    """Print the results from the JSON of ``replay`` and, if it ran, of ``closed-loop``."""
    if report["scores"]:
        show(scores_table("Causal decodes", report["scores"]), screen)
    show(latency_table({s: report["latency_ms"].get(s, {"n": 0}) for s in STAGES}), screen)
    speed = report["speed"]
    pace = "as fast as it answers" if speed is None else f"{speed:g} x real time"
    rows = {
        "bits per spike": number(report["bits_per_spike"]),
        "replayed at": f"{pace}, deadline {report['deadline_ms']:g} ms a bin",
        "statuses": ", ".join(f"{k} {v}" for k, v in report["statuses"].items()),
    }
    if not report["scores"]:
        rows = {"decodes": "none scored: latents and rates only"} | rows
    if loop is not None:
        ours, chance = loop["decoder"], loop["chance"]
        text = f"{ours['successes']} of {ours['trials']} reaches succeed (chance "
        text += f"{chance['successes']} of {chance['trials']})"
        if ours["successes"] >= FEWEST_SUCCESSES:
            text += f", time to target {number(ours['time_to_target_s'], 2)} s"
        rows["closed loop"] = text
    show_sections([Section("The session", tuple(rows.items()))], screen)


@app.command(epilog=EXAMPLE)
def demo(
    config: Annotated[
        Path, typer.Argument(help="The training configuration (TOML); see configs/.")
    ],
    recording: Annotated[
        Path | None,
        typer.Option(help="Your .nwb or .mat recording.", show_default="a simulated session"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("demo-out"),
    speed: Annotated[
        str, typer.Option(help="Speed of the replay: a multiple of real time, or max.")
    ] = "4",
    minutes: Annotated[
        float, typer.Option(help="Length of the simulated session, in minutes.")
    ] = 10.0,
    units: Annotated[
        int, typer.Option(min=1, help="Number of units of the simulated session.")
    ] = 120,
    reaches: Annotated[
        int,
        typer.Option(
            min=0, help="Number of closed-loop reaches of the simulated subject; 0 for none."
        ),
    ] = 24,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Number of gradient steps.", show_default="the config's"),
    ] = None,
    live: Annotated[
        bool, typer.Option(help="Show it live on a page, opened in a browser if there is one.")
    ] = True,
    stay: Annotated[
        bool,
        typer.Option("--stay", help="At the end go on replaying, to play with it, until Ctrl-C."),
    ] = False,
) -> None:
    """Simulate (or take your recording), train, serve, replay the held-out part, report.

    Each step is a verb, and its command is shown. The service runs as a separate process on free
    loopback ports, and is stopped at the end, when a step fails, or on Ctrl-C. Exit codes: 0 done;
    that of the step that failed; 128 + the signal's number when interrupted.
    """
    _check(config, recording, out, speed)
    screen = console()
    if live and any(find_spec(name) is None for name in ("starlette", "uvicorn")):
        screen.print("no live page: it needs the extra 'live' (pip install '.[live]')")
        live = False
    chain = Chain(screen, out, recording, live=live, stay=stay)
    try:
        with interruptible():
            chain.clear()
            chain.check(config, steps)
            chain.make_folder()
            if recording is None:
                chain.simulate(minutes, units)
            chain.train(config, steps)
            chain.serve_and_stream(speed, units, 0 if recording is not None else reaches)
    except Interrupted as stopped:
        screen.show_cursor()
        screen.print()
        screen.print(f"interrupted ({stopped}): everything it started has been stopped")
        raise typer.Exit(128 + stopped.number) from None
    chain.conclude()
