"""A simulated reaching subject: task, motor plan with dynamics, spiking units, hand.

The same code is used twice. ``simulate_session`` lets the subject move its own hand and returns a
recording to train on. A closed-loop client steps the same subject bin by bin, shows it a cursor
that a decoder moves, and uses its spikes:

    subject, task = Subject(seed=7), CentreOut(seed=8)       # tuning depends on the seed alone
    cursor = np.zeros(2)
    while task.time < 60.0:
        cue = task.step(cursor, subject.bin_width)           # target, go
        bin = subject.step(cursor, cue.target, go=cue.go)    # bin.counts -> the decoder
        cursor = cursor + decoded_velocity * subject.bin_width
    print(task.trials)                                       # success, time to target

How the subject works, every ``TICK`` (10 ms). Once a target is shown it is *planned*: a preparatory
state moves towards the target's direction and the planned speed. After ``go`` and a reaction time
the plan is released: it kicks damped oscillators (the movement state), while the intended velocity
follows a minimum-jerk path with curvature, pulled back to that path and to the target where the
cursor strays; too far off at the end, another, shorter reach begins. Units fire as Poisson with
exp(baseline + tuning . latents); slow drift and fast shared noise are part of the latents, and of
no use to a decoder. The hand follows the intended velocity with a lag of about 60 ms.

Units: metres, seconds, spikes per second. Only numpy is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ilqr_vae.errors import ShapeError
from ilqr_vae.progress import SILENT, Progress
from ilqr_vae.recordings.binning import bin_spikes, bins_of, resample
from ilqr_vae.recordings.recording import Recording, Trials
from ilqr_vae.simulated.centre_out import REACH, CentreOut, TrialRecord

Array = NDArray[np.float64]

TICK = 0.01
"""Time step of the subject in seconds; bin widths are multiples of it."""

RESOLUTION = 1 / 30000
"""Resolution of spike times in seconds."""

KINEMATIC_SCALES = {"velocity": 0.30, "position": REACH, "speed": 0.30}
LATENTS = (
    *("velocity_x", "velocity_y", "position_x", "position_y", "speed"),
    *("plan_x", "plan_y", "plan_speed", "plan_on"),
    *("rotation_1a", "rotation_1b", "rotation_2a", "rotation_2b", "trigger"),
    *("drift_1", "drift_2", "shared_1", "shared_2", "shared_3", "shared_4"),
)
"""Names of the latents, in the order of ``Subject.latents``."""

_MOTOR, _DRIFT, _SHARED = slice(0, 14), slice(14, 16), slice(16, 20)
_PLAN_TAU, _TRIGGER_TAU, _DRIFT_TAU, _SHARED_TAU = 0.10, 0.20, 30.0, 0.25
_ROTATION_TAU, _ROTATION_HZ = 0.30, (1.6, 2.3)
_LOWEST, _HIGHEST = 0.2, 120.0


# ---- the subject -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SubjectBin:
    """One bin: ``counts`` uint16 (N,), ``intended`` velocity (2,) in m/s at the end of the bin."""

    counts: NDArray[np.uint16]
    intended: Array


@dataclass(slots=True)
class _Reach:
    """A minimum-jerk movement in progress."""

    origin: Array
    goal: Array
    duration: float
    curvature: float
    elapsed: float = 0.0

    def at(self) -> tuple[Array, Array]:
        """Return position and velocity: minimum jerk along the line, a bump across it."""
        s, d = min(self.elapsed / self.duration, 1.0), self.goal - self.origin
        across = np.array([-d[1], d[0]]) * self.curvature
        along = s**3 * (10 - 15 * s + 6 * s**2)
        bump, bump_rate = 16 * (s * (1 - s)) ** 2, 32 * s * (1 - s) * (1 - 2 * s)
        rate = 30 * (s * (1 - s)) ** 2
        position = self.origin + along * d + bump * across
        return position, (rate * d + bump_rate * across) / self.duration


class Subject:
    """A subject that sees a cursor and a target, intends movements, and fires spikes.

    The same ``seed`` and ``units`` give the same tuning for any ``run``; ``run`` changes the noise
    and the variability.

    Attributes:
        units: N.
        bin_width: seconds, a whole number of ``TICK``.
        baseline: (N,), spikes per second with all latents at zero.
        tuning: (N, len(LATENTS)), log-rate per unit of latent.
        latents: (len(LATENTS),), current latents; velocity, position and speed in units of
            ``KINEMATIC_SCALES``.
        intended: (2,), current intended velocity in m/s.
    """

    def __init__(
        self, seed: int, *, units: int = 120, bin_width: float = 0.05, run: int = 0
    ) -> None:
        ticks = round(bin_width / TICK)
        if ticks < 1 or abs(ticks * TICK - bin_width) > 1e-9:
            raise ShapeError("bin_width", expected=f"a multiple of {TICK} s", got=f"{bin_width} s")
        if units < 1:
            raise ShapeError("units", expected="1 or more", got=str(units))
        self.units, self.bin_width, self._ticks = units, bin_width, ticks
        self.baseline, self.tuning = _tuning(np.random.default_rng([seed, 1]), units)
        self._rng = np.random.default_rng([seed, 2, run])
        self._map = np.random.default_rng([seed, 3]).normal(size=(4, 3)) * 0.9
        self.latents = np.zeros(len(LATENTS))
        self.latents[_DRIFT] = self._rng.normal(size=2)
        self.latents[_SHARED] = self._rng.normal(size=4)
        self.intended = np.zeros(2)
        self._goal = np.zeros(2)
        self._pace = 1.0
        self._reach: _Reach | None = None
        self._wait: float | None = None

    def step(self, cursor: Array, target: Array, *, go: bool = True) -> SubjectBin:
        """Simulate one bin with ``cursor`` and ``target`` (2,) in metres: plan, move, fire.

        Raises:
            ShapeError: either is not two finite numbers.
        """
        for name, value in (("cursor", cursor), ("target", target)):
            if np.shape(value) != (2,) or not np.isfinite(value).all():
                raise ShapeError(name, expected="two finite numbers in metres", got=str(value))
        expected = np.zeros(self.units)
        for _ in range(self._ticks):
            self.advance(cursor, target, go=go)
            expected += self.rates(self.latents) * TICK
        return SubjectBin(self._rng.poisson(expected).astype(np.uint16), self.intended.copy())

    def rates(self, latents: Array) -> Array:
        """Return spikes per second, (..., N), for latents (..., len(LATENTS))."""
        log_rate = np.log(self.baseline) + latents @ self.tuning.T
        return np.exp(np.clip(log_rate, np.log(_LOWEST), np.log(_HIGHEST)))

    def advance(self, cursor: Array, target: Array, *, go: bool = True) -> None:
        """Advance plan and latents by one tick, without spikes."""
        if np.abs(target - self._goal).max() > 1e-9:
            self._goal, self._reach, self._wait = np.array(target, dtype=np.float64), None, None
            self._pace = float(np.clip(self._rng.normal(1.0, 0.22), 0.55, 1.6))
        released = self._move(cursor, go)
        self._think(cursor, released)

    def _move(self, cursor: Array, go: bool) -> bool:
        """Update the intended velocity; return True on the tick when a reach starts."""
        reach, error = self._reach, self._goal - cursor
        distance = float(np.hypot(*error))
        if reach is not None:
            reach.elapsed += TICK
            position, velocity = reach.at()
            self.intended = velocity + 1.5 * (position - cursor)
            if reach.elapsed < reach.duration:
                return False
            self._reach, self._wait = None, float(self._rng.uniform(0.10, 0.20))
            return False
        # At rest: drift to the target slowly.
        self.intended = 2.0 * error if go and distance < 0.03 else 0.85 * self.intended
        if not go or distance < 0.012:
            return False
        if self._wait is None:
            self._wait = float(self._rng.uniform(0.15, 0.30))
        self._wait -= TICK
        if self._wait > 0:
            return False
        full = distance / REACH
        duration = float(np.clip((0.28 + 0.34 * full) / self._pace, 0.25, 1.2))
        goal = self._goal + self._rng.normal(size=2) * 0.05 * distance
        curvature = float(self._rng.normal(0.0, 0.10))
        self._reach = _Reach(np.array(cursor, dtype=np.float64), goal, duration, curvature)
        return True

    def _think(self, cursor: Array, released: bool) -> None:
        """Advance the latents by one tick."""
        x = self.latents
        x[0:2] = self.intended / KINEMATIC_SCALES["velocity"]
        x[2:4] = np.clip(cursor / KINEMATIC_SCALES["position"], -3, 3)
        x[4] = min(float(np.hypot(*x[0:2])), 3.0)
        error = (self._goal - cursor) / REACH
        distance = float(np.hypot(*error))
        planning = self._reach is None and distance > 0.3
        wanted = np.zeros(4)
        if planning:
            wanted = np.array([*(error / distance), self._pace - 1.0, 1.0])
        if released:
            x[9:13] += self._map @ x[5:8]
            x[13] += 1.0
        x[5:9] += TICK / _PLAN_TAU * (wanted - x[5:9])
        for plane, hertz in enumerate(_ROTATION_HZ):
            angle, at = 2 * np.pi * hertz * TICK, 9 + 2 * plane
            c, s = np.cos(angle), np.sin(angle)
            a, b = x[at], x[at + 1]
            x[at], x[at + 1] = c * a - s * b, s * a + c * b
        x[9:13] *= np.exp(-TICK / _ROTATION_TAU)
        x[13] *= np.exp(-TICK / _TRIGGER_TAU)
        for part, tau in ((_DRIFT, _DRIFT_TAU), (_SHARED, _SHARED_TAU)):
            keep = np.exp(-TICK / tau)
            noise = self._rng.normal(size=x[part].shape)
            x[part] = keep * x[part] + np.sqrt(1 - keep**2) * noise


def _tuning(rng: np.random.Generator, units: int) -> tuple[Array, Array]:
    """Draw baselines (N,) in spikes per second and tuning (N, latents)."""
    baseline = np.clip(np.exp(rng.normal(np.log(8.0), 0.8, units)), 1.5, 32.0)
    tuning = rng.normal(size=(units, len(LATENTS)))
    scale = np.empty(len(LATENTS))
    scale[0:2], scale[2:4], scale[4] = 0.36, 0.18, 0.15
    scale[5:7], scale[7], scale[8] = 0.30, 0.15, 0.15
    scale[9:13], scale[13] = 0.30, 0.20
    scale[_DRIFT], scale[_SHARED] = 0.15, 0.17
    # Units differ in their overall modulation by movement.
    care = rng.gamma(2.0, 0.5, size=(units, 1))
    tuning[:, _MOTOR] *= care
    return baseline, tuning * scale


# ---- a session ---------------------------------------------------------------------------------


class Hand:
    """The subject's hand, which follows the intended velocity with a lag of about 60 ms.

    Attributes:
        position, velocity: (2,), metres and metres per second.
    """

    def __init__(self) -> None:
        self.position, self.velocity, self._drive = np.zeros(2), np.zeros(2), np.zeros(2)

    def move(self, intended: Array) -> None:
        """Advance by one tick."""
        self._drive = self._drive + TICK / 0.03 * (intended - self._drive)
        self.velocity = self.velocity + TICK / 0.03 * (self._drive - self.velocity)
        self.position = self.position + TICK * self.velocity


@dataclass(frozen=True, slots=True)
class SimulatedSession:
    """A simulated session, unbinned.

    Attributes:
        spike_times: per unit, float64, seconds, increasing.
        unit_names: N.
        times: (K,), seconds of the kinematic samples, 100 a second from 0.
        position, velocity: (K, 2), metres and metres per second.
        latents: (K, len(LATENTS)), the true latents.
        rates: (N,), mean spikes per second.
        trials: finished reaches.
        duration: seconds.
        seed: seed of the simulation.
    """

    spike_times: tuple[Array, ...]
    unit_names: tuple[str, ...]
    times: Array
    position: Array
    velocity: Array
    latents: Array = field(repr=False)
    rates: Array
    trials: tuple[TrialRecord, ...]
    duration: float
    seed: int

    def to_recording(self, bin_width: float = 0.05) -> Recording:
        """Return the binned session with hand velocity (vx, vy, m/s), as read from its NWB file."""
        n_bins = int(bins_of(np.array([self.duration]), 0.0, bin_width)[0])
        starts = bins_of(np.array([t.start for t in self.trials]), 0.0, bin_width)
        stops = bins_of(np.array([t.stop for t in self.trials]), 0.0, bin_width)
        return Recording(
            counts=bin_spikes(self.spike_times, 0.0, bin_width, n_bins),
            bin_width=bin_width,
            unit_names=self.unit_names,
            kinematics=resample(self.velocity, self.times, 0.0, bin_width, n_bins),
            kinematic_names=("vx", "vy"),
            kinematic_units=("m/s", "m/s"),
            trials=Trials(starts, stops, tuple(f"target{t.target_index}" for t in self.trials)),
            name=f"simulated, seed {self.seed}",
        )


def simulate_session(
    seed: int = 0,
    *,
    minutes: float = 10.0,
    units: int = 120,
    progress: Progress = SILENT,
) -> SimulatedSession:
    """Simulate a subject that reaches with its own hand.

    Args:
        seed: seed of tuning, task and noise.
        minutes: duration, above zero.
        units: number of neurons.

    Raises:
        ShapeError: ``minutes`` or ``units`` are out of range.
    """
    ticks = round(minutes * 60 / TICK) if np.isfinite(minutes) else 0
    if ticks < 100:
        raise ShapeError("minutes", expected="one second or more", got=f"{minutes} minutes")
    subject, task, hand = Subject(seed, units=units), CentreOut(seed), Hand()
    position, velocity = np.empty((ticks, 2)), np.empty((ticks, 2))
    latents = np.empty((ticks, len(LATENTS)))
    for k in range(ticks):
        cue = task.step(hand.position, TICK)
        position[k], velocity[k] = hand.position, hand.velocity
        subject.advance(hand.position, cue.target, go=cue.go)
        latents[k] = subject.latents
        hand.move(subject.intended)
        if (k + 1) % max(ticks // 100, 1) == 0:
            progress("reaching", k + 1, ticks)
    rng = np.random.default_rng([seed, 4])
    counts = rng.poisson(subject.rates(latents) * TICK)
    spike_times: list[Array] = []
    for unit in range(units):
        bins = np.repeat(np.arange(ticks), counts[:, unit])
        exact = (bins + rng.uniform(0.0, 0.999, len(bins))) * TICK
        spike_times.append(np.unique(np.floor(exact / RESOLUTION)) * RESOLUTION)
    return SimulatedSession(
        spike_times=tuple(spike_times),
        unit_names=tuple(f"unit{i:03d}" for i in range(units)),
        times=np.arange(ticks, dtype=np.float64) * TICK,
        position=position,
        velocity=velocity,
        latents=latents,
        rates=np.array([len(t) for t in spike_times]) / (ticks * TICK),
        trials=tuple(task.trials),
        duration=ticks * TICK,
        seed=seed,
    )
