"""A simulated subject reaches on while some of its decoded units are replaced.

The loop runs in the process: the subject sees a cursor, its spikes enter the streaming estimator
bin by bin, and the decoded velocity moves the cursor. From a given time on, some of the decoded
units are others, which the model never saw. The model is unchanged, or adapted without labels as in
``evaluation.another_day``; a fit takes no time of the stream. Targets, noise and replaced units are
the same in both cases, but the subject corrects the cursor's errors, so the spikes differ once the
cursor does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ilqr_training.evaluation.another_day import Following, Refit, Schedule
from ilqr_vae.artifact import Artifact
from ilqr_vae.errors import ConfigError
from ilqr_vae.progress import Progress
from ilqr_vae.recordings import Recording
from ilqr_vae.recordings.physical_units import conversion
from ilqr_vae.simulated.centre_out import CentreOut
from ilqr_vae.simulated.subject import Subject
from ilqr_vae.streaming.ensemble import Horizon
from ilqr_vae.streaming.state import HorizonState

_EDGE = 0.20  # metres from the centre at which the cursor stops
_RUN_IN = 100


@dataclass(frozen=True)
class Turnover:
    """A session of reaching, and the units that are replaced.

    Attributes:
        subject: seed of the subject.
        units: number of the subject's units.
        columns, later: (N,) indices of the decoded units, before ``change`` and from then on.
        change, end: seconds.
        seed: seed of targets and noise.
    """

    subject: int
    units: int
    columns: NDArray[np.int64]
    later: NDArray[np.int64]
    change: float
    end: float
    seed: int


@dataclass(frozen=True)
class Reached:
    """The reaches of a session.

    Attributes:
        times: (K,) ends of the reaches in seconds.
        hit: (K,) whether each one was successful.
        fits: the fits without labels.
    """

    times: NDArray[np.float64]
    hit: NDArray[np.bool_]
    fits: tuple[Refit, ...]

    def success(self, start: float, stop: float) -> float:
        """Return the share of successes among reaches that ended then; NaN if none did."""
        inside = (self.times >= start) & (self.times < stop)
        return float(self.hit[inside].mean()) if inside.any() else float("nan")


def replaced(
    columns: NDArray[np.int64], others: NDArray[np.int64], share: float, seed: int
) -> NDArray[np.int64]:
    """Return the columns with a random share of them replaced by others."""
    rng = np.random.default_rng([seed, 1])
    count = min(round(share * len(columns)), len(others))
    later = columns.copy()
    later[rng.permutation(len(columns))[:count]] = rng.permutation(others)[:count]
    return later


def reach(
    artifact: Artifact, plan: Turnover, schedule: Schedule | None, progress: Progress
) -> Reached:
    """Run a session.

    Args:
        schedule: schedule of the fits; None if the model does not change.

    Raises:
        ConfigError: the model's first two channels are not velocities.
    """
    manifest = artifact.manifest
    scale = [conversion(unit, "m/s") for unit in manifest.kinematic_units[:2]]
    if len(scale) < 2 or None in scale:
        got = ", ".join(manifest.kinematic_units) or "none"
        raise ConfigError("model.kinematic_units", expected="two velocities first", got=got)
    width = manifest.bin_width
    bins, change = round(plan.end / width), round(plan.change / width)
    subject = Subject(plan.subject, units=plan.units, bin_width=width, run=plan.seed + 1)
    task, cursor = CentreOut(plan.seed), np.zeros(2)
    counts = np.zeros((bins, len(plan.columns)), np.uint16)
    recording = Recording(
        name="reaching", bin_width=width, counts=counts, unit_names=manifest.unit_names
    )
    following = None
    if schedule is not None:
        following = Following(artifact, schedule, width, change, plan.seed)
    estimator = artifact.estimator()
    state = estimator.init(1)
    for now in range(bins):
        while following is not None and now == following.next:
            if following.turn(recording):
                estimator = following.serving.estimator()
                state = _run_in(estimator, counts[max(0, now - _RUN_IN) : now])
        cue = task.step(cursor, width)
        fired = subject.step(cursor, cue.target, go=cue.go).counts
        counts[now] = fired[plan.columns if now < change else plan.later]
        state, velocity = _step(estimator, state, counts[now])
        moved = velocity[:2] * np.array(scale, dtype=np.float64) * width
        cursor = np.clip(cursor + moved, -_EDGE, _EDGE)
        progress("reaching", now + 1, bins)
    return Reached(
        np.array([trial.stop for trial in task.trials]),
        np.array([trial.success for trial in task.trials], dtype=bool),
        () if following is None else tuple(following.attempts),
    )


def _step(
    estimator: Horizon, state: HorizonState, counts: NDArray[np.uint16]
) -> tuple[HorizonState, NDArray[np.float64]]:
    row = torch.as_tensor(counts.astype(np.float64))[None]
    state, answer = estimator.step(state, row, torch.ones_like(row))
    return state, answer.kinematics[0].cpu().numpy()


def _run_in(estimator: Horizon, counts: NDArray[np.uint16]) -> HorizonState:
    state = estimator.init(1)
    for row in counts:
        state, _ = _step(estimator, state, row)
    return state
