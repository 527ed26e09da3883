"""An offline evaluation as a report and in the terminal."""

from __future__ import annotations

import platform
import shlex
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ilqr_training.fit.curves import Curves
from ilqr_training.readout.causal import Causal, causal_pass
from ilqr_vae.artifact import Artifact
from ilqr_vae.errors import number_of
from ilqr_vae.recordings import Recording
from ilqr_vae.recordings.split import Span, warmup_start
from ilqr_vae.report import ReportData, Table
from ilqr_vae.report.table import classes_table, number, percent, scores_table
from ilqr_vae.report.table import show as show_table
from ilqr_vae.scoring.classes import ClassScores, score_classes
from ilqr_vae.scoring.score import OURS, WIENER, Scores, score_decodes
from ilqr_vae.terminal import console

FITTED_HERE = (
    "Training and validation part are what every decoder here was fitted on in the end: scores on "
    "them flatter all. 'experiment decode' scores the validation part in a nested split instead."
)


@dataclass(frozen=True)
class EvaluationReport:
    """The evaluation of a model on a span of a recording.

    Attributes:
        span, bins: name of the span, and its half-open range.
        result: estimates of the stream.
        scores: scores of its decodes; None if there is nothing to score on.
        drops: (T,), True for bins that were left out.
        seconds: duration of the stream.
        learning, notes: learning curves of the model, and notes on them.
        tables, more: further results, as tables and for JSON.
    """

    artifact: Artifact
    recording: Recording
    span: Span
    bins: tuple[int, int]
    result: Causal
    scores: Scores | None
    drops: NDArray[np.bool_]
    seconds: float
    learning: Curves
    notes: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    more: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def probabilities(self) -> NDArray[np.float64] | None:
        """Probabilities (T, C) of the classes; None for a model without classes."""
        found = self.artifact.classes
        return None if found is None else found.probabilities(self.result.window)

    def _classes(self) -> ClassScores | None:
        names = tuple(self.artifact.manifest.classes or ())
        if (found := self.probabilities) is None:
            return None
        return score_classes(found, self.recording.labels(names)[slice(*self.bins)], names)

    def report(self) -> ReportData:
        """Return the report for the page and for JSON."""
        artifact, recording, scores = self.artifact, self.recording, self.scores
        result, span, drops = self.result, self.span, self.drops
        manifest, (start, stop) = artifact.manifest, self.bins
        part = recording.slice(start, stop)
        names = manifest.kinematic_names
        missing = drops[start:stop] | ~recording.valid[start:stop]
        facts = {"bits per spike, one step ahead": number(result.bits_per_spike)}
        if scores is not None:
            facts["causal R2, mean"] = number(scores.methods[OURS]["r2"])
            if WIENER in scores.methods:
                facts["Wiener filter, same bins"] = number(scores.methods[WIENER]["r2"])
            facts["90 % interval covers"] = percent(scores.methods[OURS]["coverage_90"])
        if (classes := self._classes()) is not None:
            facts["bins whose class is right"] = percent(classes.accuracy)
        notes = scores.notes if scores is not None else ("Nothing to score decodes on.",)
        if scores is not None and span != "test":
            notes += (FITTED_HERE,)
        notes += recording.notes + self.notes
        if len(recording.breaks):
            notes += ("Trials are laid end to end: times leave out what lay between them.",)
        sha = recording.sha256
        units = part.without_features()
        return ReportData(
            title=f"Offline causal evaluation on {recording.name}",
            kind="evaluate",
            bin_width=recording.bin_width,
            start=part.start_time,
            counts=units.counts,
            status=tuple("missing" if m else "ok" for m in missing),
            latents=result.window[:, : manifest.latents],
            latents_std=result.latent_std,
            rates=result.rates[:, : units.n_units],
            inputs=result.inputs,
            learning=self.learning,
            bits_per_spike=result.bits_per_spike,
            unit_names=units.unit_names,
            names=names,
            units=manifest.kinematic_units,
            truth=part.kinematics if names else None,
            decoded=result.kinematics if names else None,
            decoded_std=result.kinematics_std if names else None,
            baselines={} if scores is None or scores.wiener is None else {WIENER: scores.wiener},
            trials=part.trials,
            scores=scores,
            classes=classes,
            tables=self.tables,
            facts=facts,
            provenance={
                "model": manifest.model_id,
                "recording": recording.name + (f", sha256 {sha}" if sha else ""),
                "span": f"{span}: bins {start} to {stop - 1}, after "
                f"{number_of(start - warmup_start(start), 'bin')} of warm-up",
                "versions": f"ilqr-vae {version('ilqr-vae')}, Python {platform.python_version()}, "
                f"torch {torch.__version__}",
                "command": shlex.join(["ilqr-vae", "evaluate", *sys.argv[2:]]),
            },
            notes=notes,
            warnings=recording.warnings,
            extra={
                "model": manifest.model_id,
                "solver": result.statuses,
                "iterations": result.iterations,
                "seconds": self.seconds,
                "validation_scores": manifest.scores,
                **self.more,
            },
        )

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return all estimates, for ``--arrays``."""
        start, result = self.bins[0], self.result
        latents, classes = self.artifact.manifest.latents, self.probabilities
        return ({} if classes is None else {"classes": classes}) | {
            "index": np.arange(start, start + len(result.bits)),
            "kinematics": result.kinematics,
            "kinematics_std": result.kinematics_std,
            "latents": result.window[:, :latents],
            "latents_std": result.latent_std,
            "inputs": result.inputs,
            "bits": result.bits,
            "spikes": result.spikes,
        }


def evaluated(artifact: Artifact, read: Recording, span: Span) -> EvaluationReport:
    """Stream a span of a recording, and score its causal decodes.

    Raises:
        RecordingError: the recording is too short for the span.
    """
    manifest = artifact.manifest
    split = manifest.data.split
    start, stop = bins = split.occupied(span, read)
    began = time.monotonic()
    run_in = start - warmup_start(start)
    result = causal_pass(artifact.estimator(), read, start, stop, run_in=run_in)
    seconds, scores = time.monotonic() - began, None
    if read.kinematics is not None and manifest.kinematic_names:
        scores = score_decodes(
            read, split, bins=bins, decoded=result.kinematics, std=result.kinematics_std
        )
    drops = np.zeros(len(read), dtype=bool)
    return EvaluationReport(artifact, read, span, bins, result, scores, drops, seconds, {})


def show(report: ReportData) -> None:
    """Print the scores and the tables."""
    screen = console(soft_wrap=True)
    screen.print(f"{report.title}, {number_of(len(report.counts), 'bin')}", style="bold")
    if report.scores is not None:
        scores = report.scores
        show_table(scores_table("Causal decodes", scores.methods, scores.intervals), screen)
        if scores.by_speed is not None:
            quarters = ", ".join(percent(c) for c in scores.by_speed.coverage)
            screen.print(f"  the 90 % interval covers, by quarter of speed: {quarters}")
    screen.print(f"  bits per spike {number(report.bits_per_spike)}")
    for note in (*report.warnings, *report.notes):
        screen.print(f"  {note}")
    classes = () if report.classes is None else (classes_table(report.classes),)
    for table in (*classes, *report.tables):
        show_table(table, screen)
