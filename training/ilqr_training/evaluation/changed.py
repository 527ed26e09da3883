"""Streams of units that a decoder was not trained on, from one recording or from later days.

From one recording: a share of the units is excluded from training and later replaces others under
their names, or rates change. From several days: decoders are trained on the first, and each later
one is streamed after it, with units of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ilqr_vae.errors import ConfigError, RecordingError
from ilqr_vae.recordings import Recording, SplitSpec
from ilqr_vae.recordings.physical_units import in_units
from ilqr_vae.recordings.split import nested_split
from ilqr_vae.simulated.subject import simulate_session

_TRAINED = 2 / 3
"""Share of the units to train on; the others are kept to replace some of them."""
_SHIFT_HZ = 1.0
_SHARES = (0.25, 0.5)


@dataclass(frozen=True)
class Stream:
    """A stream after the training data.

    Attributes:
        name: name of the change.
        recording: the training data, then the stream, in the model's units; a unit that is gone is
            not observed there.
        own: the same bins in the units of the stream.
        bins: range of the stream.
        change: first changed bin.
        wrong: whether adaptation to this stream must be refused.
    """

    name: str
    recording: Recording
    own: Recording
    bins: tuple[int, int]
    change: int
    wrong: bool = False


def earlier_split(recording: Recording, split: SplitSpec) -> Recording:
    """Return the recording without its test part, and a split whose test part precedes it.

    The new test part is as long as the removed one, which nothing can therefore be fitted to or
    chosen on. If too little would be left to train on, the validation part becomes the test part.
    """
    trained, (start, stop) = split.span("train", recording)[1], split.span("test", recording)
    held = 2 * start - stop
    if recording.bounds is not None or 2 * held < start:
        return nested_split(recording, split)
    return replace(recording.slice(0, start), bounds=(round(held * trained / start), held))


def divided(names: tuple[str, ...], seed: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Draw units to train on, and units to replace them. Raises ConfigError if there are too
    few.
    """
    if len(names) < 3:
        raise ConfigError("--recording", expected="three units or more", got=str(len(names)))
    order = np.random.default_rng([seed, 0]).permutation(len(names))
    count = round(_TRAINED * len(names))
    kept, others = (sorted(part.tolist()) for part in (order[:count], order[count:]))
    return tuple(names[i] for i in kept), tuple(names[i] for i in others)


def turnover(
    base: Recording, others: Recording | None, bins: tuple[int, int], change: int, seed: int
) -> list[Stream]:
    """Return the unchanged stream, changed ones, and ones that must be refused.

    Args:
        base: units to train on.
        others: the same bins of the replacement units; None if the replaced units swap names.
        bins: range streamed after training.
        change: first changed bin.
    """
    counts = base.counts[change : bins[1]]

    def stream(name: str, changed: NDArray[np.uint16], *, wrong: bool = False) -> Stream:
        made = base.counts.copy()
        made[change : bins[1]] = changed
        recording = replace(base, counts=made)
        return Stream(name, recording, recording, bins, change, wrong)

    streams = [stream("nothing", counts)]
    rng = np.random.default_rng([seed, 1])
    gone = rng.permutation(base.n_units)
    come = None if others is None else rng.permutation(others.n_units)
    for share in _SHARES:
        number = round(share * base.n_units)
        made = counts.copy()
        if others is None or come is None:
            made[:, gone[:number]] = counts[:, np.roll(gone[:number], 1)]
        else:
            number = min(number, others.n_units)
            made[:, gone[:number]] = others.counts[change : bins[1], come[:number]]
        streams.append(stream(f"{share:.0%} of units replaced", made))
    streams.append(stream("gains and baselines", _drifted(counts, base.bin_width, rng)))
    shuffled = rng.permuted(counts, axis=0)
    streams.append(stream("shuffled in time", shuffled, wrong=True))
    streams.append(stream("silence", np.zeros_like(counts), wrong=True))
    return [*streams, stream("a stranger", _stranger(counts.shape, base, seed), wrong=True)]


def _drifted(
    counts: NDArray[np.uint16], bin_width: float, rng: np.random.Generator
) -> NDArray[np.uint16]:
    """Scale rates by 0.5 to 2, and shift them by about a spike per second."""
    units = counts.shape[1]
    factor = 2 ** rng.uniform(-1, 1, units)
    shift = _SHIFT_HZ * bin_width * rng.normal(size=units)
    made = rng.binomial(counts, np.minimum(factor, 1))
    made = made + rng.poisson(np.maximum(factor - 1, 0) * counts)
    made = np.maximum(made - rng.poisson(np.maximum(-shift, 0), counts.shape), 0)
    return (made + rng.poisson(np.maximum(shift, 0), counts.shape)).astype(np.uint16)


def _stranger(shape: tuple[int, int], like: Recording, seed: int) -> NDArray[np.uint16]:
    """Return a simulated recording of another brain under the same unit names."""
    minutes = (shape[0] + 2) * like.bin_width / 60
    session = simulate_session(1000 + seed, minutes=max(minutes, 0.05), units=shape[1])
    return session.to_recording(like.bin_width).counts[: shape[0]]


# ---- days --------------------------------------------------------------------------------------


def days_after(
    first: Recording, days: Mapping[str, Recording], split: SplitSpec, minutes: float
) -> tuple[Recording, list[Stream]]:
    """Return the first day, and one stream per later day.

    Args:
        first: the units to train on.
        days: later days by name, in order; units are matched by name.
        split: split of the first day.
        minutes: length of each stream, from the start of the day.

    Raises:
        RecordingError: a day lacks kinematics, or has other bins, channels or units of measure.
    """
    cut: list[Recording] = []
    for name, day in days.items():
        day.require_bin_width(first.bin_width)
        if day.kinematic_names != first.kinematic_names or day.kinematics is None:
            raise RecordingError(
                f"recording {name}",
                expected=f"the first day's channels {', '.join(first.kinematic_names)}",
                got=", ".join(day.kinematic_names) or "none",
            )
        last = min(len(day), max(1, round(60 * minutes / day.bin_width)))
        cut.append(in_units(day, first.kinematic_units, name).slice(0, last))
    trained, chosen = split.span("train", first)[1], split.span("validation", first)[1]
    bounds = (trained, chosen)
    whole = _joined([first, *cut], first.unit_names, bounds)
    streams: list[Stream] = []
    start = len(first)
    for name, day in zip(days, cut, strict=True):
        own = _joined([first, *cut], day.unit_names, bounds)
        streams.append(Stream(name, whole, own, (start, start + len(day)), start))
        start += len(day)
    return whole, streams


def _joined(parts: list[Recording], names: tuple[str, ...], bounds: tuple[int, int]) -> Recording:
    """Concatenate two recordings in these units."""
    index = {name: i for i, name in enumerate(names)}
    counts, observed = ([], [])
    for part in parts:
        here = [(i, index[name]) for i, name in enumerate(part.unit_names) if name in index]
        source, to = (np.array([pair[k] for pair in here], dtype=np.int64) for k in (0, 1))
        one = np.zeros((len(part), len(names)), dtype=np.uint16)
        seen = np.zeros(one.shape, dtype=bool)
        one[:, to], seen[:, to] = part.counts[:, source], part.mask()[:, source]
        counts.append(one)
        observed.append(seen)
    starts = np.cumsum([0, *(len(part) for part in parts)])
    breaks = [starts[1:-1], *(s + part.breaks for s, part in zip(starts, parts, strict=False))]
    return replace(
        parts[0],
        counts=np.concatenate(counts),
        unit_names=names,
        kinematics=np.concatenate([np.asarray(part.kinematics) for part in parts]),
        trials=None,
        valid=np.concatenate([part.valid for part in parts]),
        scored=np.concatenate([part.scored for part in parts]),
        observed=np.concatenate(observed),
        breaks=np.unique(np.concatenate(breaks)),
        held_out=(),
        bounds=bounds,
    )
