"""Learning from less: which bins are left, and that the test part stays what it is."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from ilqr_training.config import TrainConfig, check, with_fraction
from ilqr_vae.errors import ConfigError
from ilqr_vae.recordings import Recording, SplitSpec
from ilqr_vae.recordings.joined import join
from ilqr_vae.recordings.split import nested_split

T = 1000
SPLIT = SplitSpec(train=0.6, validation=0.75)


def made(bounds: tuple[int, int] | None = None, every: int = 0) -> Recording:
    """Bins that hold their own number; ``every`` so many, a trial begins."""
    counts = np.repeat(np.arange(T, dtype=np.uint16)[:, None], 2, axis=1)
    breaks = np.arange(every, T, every) if every else np.empty(0, dtype=np.int64)
    return Recording(
        counts=counts, bin_width=0.05, unit_names=("a", "b"), breaks=breaks, bounds=bounds
    )


def spans(split: SplitSpec, recording: Recording) -> list[tuple[int, int]]:
    return [split.span(s, recording) for s in ("train", "validation", "test", "all")]


def test_a_tenth_of_all_bins_is_learnt_from_and_the_test_part_stays() -> None:
    tenth = msgspec.structs.replace(SPLIT, fraction=0.1)
    assert spans(tenth, made()) == [(0, 80), (80, 100), (750, 1000), (0, 1000)]
    # as much as there is
    most = msgspec.structs.replace(SPLIT, fraction=0.9)
    assert spans(most, made()) == spans(SPLIT, made())


def test_trials_stay_whole() -> None:
    tenth = msgspec.structs.replace(SPLIT, fraction=0.1)
    recording = made(bounds=(600, 744), every=24)
    assert spans(tenth, recording) == [(0, 72), (72, 96), (744, 1000), (0, 1000)]


def test_sessions_lose_what_is_left_out_of_each_once() -> None:
    tenth = msgspec.structs.replace(SPLIT, fraction=0.1)
    joined = join({"m": made(), "t": made()}, tenth)
    assert joined.bounds == (160, 200)
    assert spans(SPLIT, joined)[:3] == [(0, 160), (160, 200), (200, 700)]


def test_a_nested_split_holds_nothing_of_the_test_part() -> None:
    tried = nested_split(made(), SPLIT)
    assert len(tried) == 750
    assert spans(SPLIT, tried)[:3] == [(0, 480), (480, 600), (600, 750)]
    tried = nested_split(made(bounds=(600, 744), every=24), SPLIT)
    assert spans(SPLIT, tried)[:3] == [(0, 480), (480, 600), (600, 744)]
    # and its own bins otherwise
    np.testing.assert_array_equal(tried.counts, made().counts[:744])


def test_a_fraction_out_of_range_is_named() -> None:
    for fraction in (0.0, 1.5):
        with pytest.raises(ConfigError, match=r"data\.split\.fraction"):
            check(with_fraction(TrainConfig(), fraction))
