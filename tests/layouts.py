"""Small files in the layouts of public recordings, made up: reaches, units tuned to velocity.

What is odd in the real files is odd here: kinematics that are NaN between trials, timestamps that
jump, spikes out of order, units that never fire, trials without a movement, integer stamps.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pynwb
from numpy.typing import NDArray

Array = NDArray[np.float64]

N_UNITS, N_HELD_OUT = 9, 3


def file() -> Any:
    return pynwb.NWBFile("made up", "id", datetime(2024, 1, 1, tzinfo=UTC))


def save(path: Path, nwb: Any) -> Path:
    with pynwb.NWBHDF5IO(str(path), "w") as io:
        io.write(nwb)
    return path


@dataclass(frozen=True)
class Reaches:
    """K reaches on a millisecond clock.

    Attributes:
        time: (T,), seconds.
        velocity: (T, 2), mm/s.
        spikes: unsorted times, one array a unit; the last never fires.
        start, stop, onset: (K,), seconds.
        angle: (K,), degrees.
    """

    time: Array
    velocity: Array
    spikes: list[Array]
    start: Array
    stop: Array
    onset: Array
    angle: Array


def reaches(
    trials: int, length: float, onset: float, *, gap: float = 0.4, seed: int = 0
) -> Reaches:
    """Reaches of ``length`` seconds, ``gap`` apart, that begin ``onset`` into each trial."""
    rng = np.random.default_rng(seed)
    every = length + gap
    time = np.round(np.arange(round((trials * every + 0.3) * 1000)) * 1e-3, 6)
    start = np.round(0.1 + every * np.arange(trials), 3)
    begin = start + onset
    angle = rng.integers(0, 4, trials) * 90.0
    velocity = np.zeros((len(time), 2))
    for t, a in zip(begin, np.deg2rad(angle), strict=True):
        phase = ((time - t) / 0.4).clip(0, 1)
        speed = 480.0 * (phase * (1 - phase)) ** 2
        velocity += speed[:, None] * [np.cos(a), np.sin(a)]
    gain = rng.normal(size=(2, N_UNITS)) * 0.06
    rates = 25.0 * np.exp(velocity @ gain)
    rates[:, -1] = 0.0
    spikes: list[Array] = []
    for unit in range(N_UNITS):
        ticks = np.flatnonzero(rng.random(len(time)) < rates[:, unit] * 1e-3)
        spikes.append(rng.permutation(time[ticks] + rng.uniform(0, 9e-4, len(ticks))))
    return Reaches(time, velocity, spikes, start, start + length, begin, angle)


def _units(nwb: Any, made: Reaches, *, observed: bool) -> None:
    nwb.add_unit_column("heldout", "held out for co-smoothing")
    for i, times in enumerate(made.spikes):
        options: dict[str, Any] = {}
        if observed:
            options["obs_intervals"] = np.stack([made.start - 0.05, made.stop + 0.05], axis=1)
        nwb.add_unit(spike_times=times, id=100 + i, heldout=i % 3 == 2, **options)


def _labels(trials: int) -> list[str]:
    kinds = ["train", "train", "train", "val", "train", "none"]
    return [kinds[i % len(kinds)] for i in range(trials)]


def _add(module: Any, name: str, data: Array, time: Array, unit: str) -> None:
    module.add(
        pynwb.TimeSeries(
            name=name,
            data=data,
            unit=unit,
            timestamps=time,
            comments="columns=[x,y]",
            description=name,
        )
    )


def mc_maze(path: Path, trials: int = 30) -> Path:
    """DANDI 000128: behaviour on stamps with jumps between trials, onsets, split, conditions."""
    made = reaches(trials, 1.2, 0.45)
    nwb = file()
    _units(nwb, made, observed=True)
    module = nwb.create_processing_module("behavior", "movement")
    position = np.cumsum(made.velocity, axis=0) * 1e-3
    inside = np.zeros(len(made.time), dtype=bool)
    for a, b in zip(made.start, made.stop, strict=True):
        inside |= (made.time >= a - 0.05) & (made.time < b + 0.3)
    shown = made.velocity.copy()
    shown[(made.time > made.start[2] + 0.3) & (made.time < made.start[2] + 0.4)] = np.nan
    shown[(made.time > made.start[4] - 0.3) & (made.time < made.stop[4] + 0.3)] = np.nan
    for name, data, unit in (
        ("cursor_pos", position, "mm"),
        ("hand_pos", position, "mm"),
        ("hand_vel", shown, "mm/s"),
    ):
        _add(module, name, data[inside], made.time[inside], unit)
    for name in ("target_on_time", "go_cue_time", "move_onset_time", "split", "trial_type"):
        nwb.add_trial_column(name, name)
    nwb.add_trial_column("trial_version", "barriers")
    nwb.add_trial_column("target_pos", "targets", index=True)
    for k, label in enumerate(_labels(trials)):
        nwb.add_trial(
            start_time=made.start[k],
            stop_time=made.stop[k],
            target_on_time=made.start[k] + 0.1,
            go_cue_time=made.start[k] + 0.2,
            move_onset_time=np.nan if k == 7 else made.onset[k],
            split=label,
            trial_type=int(made.angle[k] // 90),
            trial_version=k % 2,
            target_pos=[1.0, 2.0, 3.0][: 1 + k % 3],
        )
    return save(path, nwb)


def mc_rtt(path: Path, trials: int = 40) -> Path:
    """DANDI 000129: no events, trials of 600 ms one after the other, a NaN stretch."""
    made = reaches(trials, 0.6, 0.1, gap=0.0)
    nwb = file()
    _units(nwb, made, observed=False)
    module = nwb.create_processing_module("behavior", "movement")
    velocity = made.velocity.copy()
    velocity[3000:3050] = np.nan
    _add(module, "finger_pos", np.cumsum(made.velocity, axis=0) * 1e-3, made.time, "mm")
    _add(module, "finger_vel", velocity, made.time, "mm/s")
    nwb.add_trial_column("split", "split")
    for k, label in enumerate(_labels(trials)):
        nwb.add_trial(start_time=made.start[k], stop_time=made.stop[k], split=label)
    return save(path, nwb)


def area2_bump(path: Path, trials: int = 30) -> Path:
    """DANDI 000127: bumps and reaches, a rate instead of stamps, centimetres."""
    made = reaches(trials, 1.0, 0.25)
    nwb = file()
    _units(nwb, made, observed=False)
    module = nwb.create_processing_module("behavior", "movement")
    for name, data in (("hand_vel", made.velocity / 10), ("joint_ang", made.velocity)):
        module.add(
            pynwb.TimeSeries(name=name, data=data, unit="cm/s", rate=1000.0, starting_time=0.0)
        )
    for name in ("move_onset_time", "split", "cond_dir", "ctr_hold_bump", "bump_dir"):
        nwb.add_trial_column(name, name)
    for k, label in enumerate(_labels(trials)):
        nwb.add_trial(
            start_time=made.start[k],
            stop_time=made.stop[k],
            move_onset_time=made.onset[k],
            split=label,
            cond_dir=made.angle[k],
            ctr_hold_bump=k % 2 == 0,
            bump_dir=np.nan if k % 2 else made.angle[k],
        )
    return save(path, nwb)


def falcon_m2(path: Path, trials: int = 12) -> Path:
    """DANDI 000953: one-channel series in a container, 20 ms stamps that jump, ``eval_mask``."""
    made = reaches(trials, 1.0, 0.2)
    nwb = file()
    for times in made.spikes:
        nwb.add_unit(spike_times=np.sort(times))
    time = made.time[::20]
    keep = (time < made.stop[5]) | (time >= made.start[6])
    velocity = made.velocity[: len(time) * 20].reshape(-1, 20, 2).mean(axis=1)
    fingers = [
        pynwb.TimeSeries(name=name, data=velocity[keep, i], unit="a.u.", timestamps=time[keep])
        for i, name in enumerate(("index", "mrs"))
    ]
    nwb.add_acquisition(pynwb.behavior.BehavioralTimeSeries(name="finger_vel", time_series=fingers))
    mask = (time[keep] % 1.0) > 0.2
    nwb.add_acquisition(
        pynwb.TimeSeries(name="eval_mask", data=mask, unit="bool", timestamps=time[keep])
    )
    for a, b in zip(made.start, made.stop, strict=True):
        nwb.add_trial(start_time=a, stop_time=b)
    return save(path, nwb)


def falcon_h1(path: Path, trials: int = 12) -> Path:
    """DANDI 000954: seven velocities with the interval in the rate's place, ``eval_mask``."""
    made = reaches(trials, 1.0, 0.2)
    nwb = file()
    for times in made.spikes:
        nwb.add_unit(spike_times=np.sort(times))
    slow = made.velocity[: len(made.time) // 20 * 20].reshape(-1, 20, 2).mean(axis=1)
    seven = np.concatenate([slow, slow, slow, slow[:, :1]], axis=1)
    for name, data in (
        ("OpenLoopKinematics", np.cumsum(seven, axis=0)),
        ("OpenLoopKinematicsVelocity", seven),
        ("eval_mask", np.arange(len(seven)) % 50 > 5),
    ):
        nwb.add_acquisition(pynwb.TimeSeries(name=name, data=data, unit="a.u.", rate=0.02))
    return save(path, nwb)


def nlb_hdf5(path: Path, *, trials: int = 20, bins: int = 30, behaviour: bool = True) -> Path:
    """What nlb_tools' make_train_input_tensors and make_eval_* leave, in one file."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as h5:
        for part, n in (("train", trials), ("eval", trials // 4)):
            velocity = rng.normal(size=(n, bins, 2)).cumsum(axis=1)
            rates = np.exp(0.15 * velocity @ rng.normal(size=(2, N_UNITS)) - 1.0).clip(0, 5)
            counts = rng.poisson(rates).astype(np.float64)
            h5[f"{part}_spikes_heldin"] = counts[..., :-N_HELD_OUT]
            h5[f"{part}_spikes_heldout"] = counts[..., -N_HELD_OUT:]
            if behaviour:
                velocity[0, 3] = np.nan
                velocity[1] = np.nan if part == "train" else velocity[1]
                h5[f"{part}_behavior"] = velocity
    return path


def self_paced(path: Path, seconds: float = 30.0) -> Path:
    """Zenodo 3854034: MAT 7.3 with a cell array of spike times, channels x units, 250 Hz."""
    made = reaches(int(seconds / 0.6), 0.6, 0.1, gap=0.0)
    time = made.time[::4] + 4000.0
    position = 0.1 * np.cumsum(made.velocity, axis=0)[::4] * 1e-3
    with h5py.File(path, "w", userblock_size=512) as h5:
        h5["t"] = time[None]
        h5["cursor_pos"] = position.T
        h5["finger_pos"] = np.concatenate([0 * position[:, :1], -position], axis=1).T
        h5["target_pos"] = np.round(position).T
        cells = np.empty((2, N_UNITS), dtype=h5py.ref_dtype)  # reversed: units x channels
        for u in range(2):
            for c in range(N_UNITS):
                node = h5.create_dataset(f"#refs#/{u}{c}", data=np.zeros(2, dtype=np.uint64))
                if u == 1 and len(made.spikes[c]):
                    node = h5.create_dataset(
                        f"#refs#/{u}{c}s", data=np.sort(made.spikes[c])[None] + 4000.0
                    )
                else:
                    node.attrs["MATLAB_empty"] = np.uint8(1)
                cells[u, c] = node.ref
        h5.create_dataset("spikes", data=cells, dtype=h5py.ref_dtype)
    with path.open("r+b") as raw:
        raw.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM")
    return path
