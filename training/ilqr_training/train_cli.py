"""``ilqr-vae train``: fit a model to a recording."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import msgspec
import torch
import typer
from rich.console import Console
from rich.progress import TaskID

from ilqr_training.config import TrainConfig, check, load_config, with_fraction
from ilqr_training.evaluation.baselines import GRU, KALMAN, fit_rivals
from ilqr_training.fit.crops import Prepared, prepare
from ilqr_training.fit.curves import log_folder
from ilqr_training.fit.joint import session_path, train_sessions
from ilqr_training.fit.loop import Report
from ilqr_training.fit.memory import estimate
from ilqr_training.fit.train import Trained, Watcher, checkpoint_path, train
from ilqr_training.fit.validate import Validation
from ilqr_vae.artifact import Manifest
from ilqr_vae.errors import ConfigError, ShapeError
from ilqr_vae.files import STDOUT, check_folder, check_writable, write_whole
from ilqr_vae.kernels.backend import device_of
from ilqr_vae.kernels.cpu import threads
from ilqr_vae.machine import cores
from ilqr_vae.recordings import load_recording
from ilqr_vae.report import Table
from ilqr_vae.report.table import WIDTH, shown
from ilqr_vae.scoring.score import OURS, WIENER
from ilqr_vae.terminal import console, progress

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

EXAMPLE = "Example: ilqr-vae train configs/demo.toml --recording reach.nwb --out reach.safetensors"


class Terminal:
    """Shows training as a progress bar with the newest numbers."""

    def __init__(self, console: Console, config: TrainConfig) -> None:
        self.console, self.config, self.steps = console, config, config.training.steps
        self.bar = progress(console, note=True)
        self.task: TaskID = self.bar.add_task("training", total=self.steps, note="")
        self.side: TaskID | None = None
        self.began: tuple[float, int] | None = None
        self.newest = ""
        self.data: Prepared | None = None

    def prepared(self, data: Prepared) -> None:
        self.data = data
        r = data.recording
        (a, b), (c, d), (e, f) = data.train, data.validation, data.test
        what = ", ".join(r.kinematic_names) or "none"
        self.console.print(
            f"{r.name}: {len(r)} bins of {r.bin_width * 1e3:g} ms, {r.n_units} units, kinematics: "
            f"{what}; train {a}:{b}, validation {c}:{d}, test {e}:{f}"
        )
        for text in (*r.notes, str(estimate(self.config, data))):
            self.console.print(f"  {text}", soft_wrap=True)

    def stepped(self, report: Report) -> None:
        self._end_side()
        if self.began is None:  # after the first step: it compiles, and a resumed run begins late
            self.began = time.monotonic(), report.step
        note = (
            f"bound {report.bound:.1f} nats/bin, KL {report.kl:.2f}, "
            f"{report.iterations:.1f} iterations{self.newest}"
        )
        self.bar.update(self.task, completed=report.step, note=note)

    def validating(self, what: str, done: int, of: int) -> None:
        if self.side is None:
            self.side = self.bar.add_task(what, total=of, note="")
        self.bar.update(self.side, description=what, completed=done, total=of)

    def validated(self, step: int, validation: Validation, best: bool) -> None:
        self._end_side()
        scores = validation.scores
        decode = f"causal R2 {scores['r2']:.4f}, " if "r2" in scores else ""
        mark = "  (best so far)" if best else ""
        if decode:
            self.newest = f"; causal R2 {scores['r2']:.3f} at step {step}"
        self.console.print(
            f"step {step}: {decode}{scores['bits_per_spike']:.4f} bits per spike on the "
            f"validation part{mark}{self._left(step)}",
            soft_wrap=True,
        )

    def _left(self, step: int) -> str:
        """Time until the last step at the pace so far, validations included."""
        if self.began is None or step <= self.began[1] or step >= self.steps:
            return ""
        pace = (time.monotonic() - self.began[0]) / (step - self.began[1])
        return f"; {clock(pace * (self.steps - step))} left at most"

    def _end_side(self) -> None:
        if self.side is not None:
            self.bar.remove_task(self.side)
            self.side = None


def clock(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def overridden(
    config: TrainConfig, *, fraction: float | None = None, **given: int | str | None
) -> TrainConfig:
    """A configuration with what the command line says instead. Raises ConfigError."""
    changes = {k: v for k, v in given.items() if v is not None}
    loop = msgspec.structs.replace(config.training, **changes)
    changed = msgspec.structs.replace(config, training=loop)
    return check(changed if fraction is None else with_fraction(changed, fraction))


@app.command(epilog=EXAMPLE)
def train_command(
    config: Annotated[Path, typer.Argument(help="TOML with overrides; see configs/.")],
    recording: Annotated[
        list[Path],
        typer.Option(
            help="A .nwb, .mat or .h5 recording. Several: their dynamics are shared, and each "
            "session gets a model file of its own units beside --out."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The model file to write (.safetensors).")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the checkpoint beside --out.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Instead of the config's.")] = None,
    steps: Annotated[int | None, typer.Option(help="Instead of the config's.")] = None,
    fraction: Annotated[
        float | None,
        typer.Option(
            help="Learn from this first share of the recording alone, what is chosen included; "
            "the test part stays the same. Instead of the config's."
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Instead of the config's: cpu, cuda, cuda:N or auto.")
    ] = None,
    log_dir: Annotated[
        Path | None, typer.Option(help="TensorBoard events; default beside --out.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; default one per core.")
    ] = None,
    baselines: Annotated[
        bool,
        typer.Option(help="Fit a Wiener and a Kalman filter too, and show their scores beside."),
    ] = True,
    gru: Annotated[
        bool, typer.Option("--gru", help="A GRU among those baselines; takes minutes.")
    ] = False,
    check_only: Annotated[
        bool,
        typer.Option("--check", help="Check the configuration and the recordings, and end."),
    ] = False,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write the scores and the history here; - is stdout."),
    ] = None,
) -> None:
    """Fit a model to a recording: its latent dynamics, and a causal readout of its kinematics.

    Trains on the first part of the recording, chooses everything on the validation part, never
    looks at the test part. Interrupted runs continue with --resume, to the same result.
    """
    if out.suffix != ".safetensors":
        raise ConfigError("--out", expected="a name ending in .safetensors", got=str(out))
    settings = overridden(
        load_config(config), seed=seed, steps=steps, device=device, fraction=fraction
    )
    device_of(settings.training.device)
    if check_only:
        for path in recording:
            if path.exists():  # one that is still to be made cannot be looked at
                _look(path, settings, alone=len(recording) == 1)
        return
    check_writable(out, "--out")
    check_writable(json_file, "--json")
    events = log_dir or log_folder(out)
    check_folder(events, "--log-dir")
    use_threads(threads)
    screen = console(stderr=True)
    terminal = Terminal(screen, settings)
    began = time.monotonic()
    try:
        with terminal.bar:
            done, own = _fit(settings, recording, out, terminal, resume, events)
    except KeyboardInterrupt:
        kept = checkpoint_path(out)
        hint = f"; continue with --resume ({kept.name})" if kept.exists() else ""
        screen.print(f"interrupted{hint}")
        raise typer.Exit(130) from None
    seconds = time.monotonic() - began
    beside = {}
    if terminal.data is not None and len(recording) == 1 and baselines:
        beside = _beside(terminal.data, settings, gru, screen)
    scores = {k: round(v, 4) for k, v in done.manifest.measured.items()}
    if json_file is not None:
        content = {
            "model": done.manifest.model_id,
            "scores": done.manifest.scores,
            "baselines": {name: {"r2": score} for name, score in beside.items()},
            "provenance": done.manifest.provenance,
            "steps": done.steps,
            "best_step": done.best_step,
            "history": done.history,
            "seconds": done.seconds,
        }
        write_whole(json_file, msgspec.json.format(msgspec.json.encode(content)).decode() + "\n")
    on_stderr = json_file == STDOUT
    said = console(soft_wrap=True, stderr=on_stderr)
    said.print(
        f"wrote {out} (model {done.manifest.model_id}) after {done.steps} steps, best at "
        f"{done.best_step}, {seconds:.0f} s; causal validation scores: {scores}"
    )
    if beside:
        table = shown(_table(done.manifest.scores["r2"], beside))
        console(width=WIDTH, stderr=on_stderr).print(table)
    for name, manifest in own.items():
        own_scores = {k: round(v, 4) for k, v in manifest.measured.items()}
        said.print(f"wrote {session_path(out, name)} (model {manifest.model_id}): {own_scores}")


def _look(path: Path, settings: TrainConfig, *, alone: bool) -> None:
    """Read a recording and say what it holds, as training would. Raises RecordingError."""
    chunk = settings.training.chunk if alone else 1
    data = prepare(load_recording(path, settings.data), settings.data, chunk=chunk)
    Terminal(console(stderr=True), settings).prepared(data)


def _beside(data: Prepared, settings: TrainConfig, gru: bool, screen: Console) -> dict[str, float]:
    """What baselines score on the validation part, mean R2 by name."""
    if data.recording.kinematics is None:
        return {}
    names = (WIENER, KALMAN, GRU) if gru else (WIENER, KALMAN)
    try:
        with progress(screen) as bar:
            task = bar.add_task("baselines")
            fitted = fit_rivals(
                data.recording,
                settings.data.split,
                names,
                seed=settings.training.seed,
                say=lambda what, done, of: bar.update(
                    task, description=f"fitting the {what}", completed=done, total=of
                ),
            )
    except ShapeError as error:  # the model is written: what stands beside it must not undo that
        screen.print(f"no baselines: {error}")
        return {}
    return {name: rival.validation_r2 for name, rival in fitted.items()}


def _table(ours: float, beside: dict[str, float]) -> Table:
    return Table(
        "Validation part",
        "Fitted on the training part, chosen on the validation part, scored there.",
        ("validation part, causal", "R2"),
        tuple((name, f"{score:.4f}") for name, score in ({OURS: ours} | beside).items()),
    )


def _fit(
    settings: TrainConfig,
    recordings: list[Path],
    out: Path,
    watcher: Watcher,
    resume: bool,
    log_dir: Path,
) -> tuple[Trained, dict[str, Manifest]]:
    """The run, and each session's manifest where there are several."""
    if len(recordings) == 1:
        return train(settings, recordings[0], out, watcher, resume=resume, log_dir=log_dir), {}
    return train_sessions(settings, recordings, out, watcher, resume=resume, log_dir=log_dir)


def use_threads(count: int | None) -> None:
    """Give the compiled kernels the cores, and torch one thread.

    The batched torch operations here are small, and two pools of threads on the same cores slow
    each other by an order of magnitude on a busy machine.
    """
    torch.set_num_threads(1)
    threads.use(count or cores())
