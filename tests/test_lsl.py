"""The bridge to the lab streaming layer, against the real package on this machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pylsl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ilqr_clients.answer import Answer
from ilqr_clients.bridges.lsl import STATUSES, LslBridge
from ilqr_clients.bridges.stamps import StampIndex
from ilqr_service.server import Service
from ilqr_vae.cli import main
from rig import make_model, serving, through_sdk, until

WAIT_S = 20.0
UNITS = 5
pylsl.set_config_content("[multicast]\nResolveScope = machine\n")


# ---- numbers for stamps ------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_stamps_that_jitter_drift_and_skip_give_the_numbers_of_the_bins(
    data: st.DataObject,
) -> None:
    skips = data.draw(st.lists(st.integers(1, 15), max_size=60))
    drift = data.draw(st.floats(-1e-3, 1e-3))
    numbers = np.cumsum([0, *skips])
    jitter = data.draw(st.lists(st.floats(-0.2, 0.2), min_size=len(numbers), max_size=len(numbers)))
    place = StampIndex(0.05)
    for number, off in zip(numbers.tolist(), jitter, strict=True):
        at = number * 0.05
        stamp = 1000.0 + at * (1 + drift) + (off * 0.05 if number else 0.0)
        assert place.place(stamp, at).index == number


def test_repeated_late_and_stepped_stamps_are_told_apart() -> None:
    place = StampIndex(0.05)
    assert [place.place(10 + k * 0.05, k * 0.05).kind for k in range(3)] == ["next"] * 3
    gap = place.place(10.3, 0.3)
    assert (gap.index, gap.kind, gap.skipped) == (6, "gap", 3)
    assert place.place(10.3, 0.31).kind == "repeated"
    late = place.place(10.2, 0.32)
    assert (late.index, late.kind) == (4, "late")
    step = place.place(4010.0, 0.35)
    assert (step.index, step.kind) == (7, "step")
    assert place.place(4010.05, 0.4).index == 8
    back = place.place(3.0, 5.4)  # after a pause of 5 s
    assert (back.index, back.kind, back.skipped) == (108, "step", 99)


# ---- the bridge --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("lsl")
    model = make_model(folder / "m.safetensors", n_units=UNITS, horizon=50)
    with serving(model) as running:
        yield running


def outlet(name: str, channels: int, *labels: str, rate: float = 0.0, kind: int = 0) -> Any:
    info = pylsl.StreamInfo(name, "Spikes", channels, rate, kind or pylsl.cf_float32, f"{name}-id")
    if labels:
        info.set_channel_labels(list(labels))
    return pylsl.StreamOutlet(info)


class Rows:
    """Reads the stream of decodes: the newest revision of each bin."""

    def __init__(self, name: str) -> None:
        (info,) = pylsl.resolve_byprop("name", name, 1, WAIT_S)
        self.inlet = pylsl.StreamInlet(info)
        self.inlet.open_stream(WAIT_S)
        self.labels = self.inlet.info(WAIT_S).get_channel_labels()
        self.rows: dict[int, tuple[list[float], float]] = {}

    def upto(self, last: int) -> None:
        end = time.monotonic() + WAIT_S
        while last not in self.rows:
            assert time.monotonic() < end, f"bin {last} of {sorted(self.rows)}"
            for row, stamp in zip(*self.inlet.pull_chunk(0.1, min_samples=1), strict=True):
                before = self.rows.get(int(row[0]))
                if before is None or before[0][1] <= row[1]:
                    self.rows[int(row[0])] = (row, stamp)

    def column(self, label: str) -> list[float]:
        k = self.labels.index(label)
        return [self.rows[index][0][k] for index in sorted(self.rows)]


@contextmanager
def bridging(service: Service, stream: str, session: str, **options: Any) -> Iterator[Any]:
    said: list[str] = []
    stop = threading.Event()
    options |= {"deadline": 60.0, "clocked": False}
    bridge = LslBridge(
        service.ingest, stream, session, out=f"{session}-out", say=said.append, **options
    )
    thread = threading.Thread(target=bridge.run, args=(stop,))
    thread.start()
    try:
        yield bridge, said
    finally:
        stop.set()
        thread.join()
        bridge.close()


def same(rows: Rows, by_index: dict[int, Answer]) -> None:
    answers = [by_index[k] for k in sorted(by_index)]
    assert sorted(rows.rows) == [a.index for a in answers]
    for label, values in (("vx", 0), ("vy", 1)):
        assert rows.column(label) == [a.kinematics[values] for a in answers]
    assert [STATUSES[int(s)] for s in rows.column("status")] == [a.status for a in answers]


def test_bins_through_lsl_decode_as_through_the_sdk_whatever_the_source_does(
    service: Service,
) -> None:
    counts = np.random.default_rng(0).poisson(1.0, (40, UNITS))
    names = [f"unit{k}" for k in range(UNITS)]
    order = [3, 0, 4, 1, 2]
    source = outlet("counts", UNITS, *[names[k] for k in order], rate=20.0)
    marks = outlet("marks", 1, kind=pylsl.cf_string)
    with bridging(service, "counts", "lsl", markers="marks") as (bridge, said):
        rows = Rows("lsl-out")
        assert source.wait_for_consumers(WAIT_S)
        began = pylsl.local_clock()

        def push(index: int, at: float | None = None) -> None:
            stamp = began + index * 0.05 if at is None else at
            source.push_sample(counts[index, order].astype(float).tolist(), timestamp=stamp)

        for index in range(8):
            push(index)
        push(7)  # again
        push(11)  # 8 to 10 did not come
        push(9)  # late
        rows.upto(11)
        until("late", lambda: bridge.tally["late"] == 1)
        assert marks.wait_for_consumers(WAIT_S)
        marks.push_sample(["trial_start"], timestamp=began + 0.3)
        until("marker", lambda: bridge.tally["markers"] == 1)
        del source  # the source restarts, with its channels in another order, and its clock is set
        until("gone", lambda: any("is gone" in line for line in said))
        order[:] = range(UNITS)
        source = outlet("counts", UNITS, *names, rate=20.0)
        until("back", lambda: bridge.tally["found"] == 2)
        assert source.wait_for_consumers(WAIT_S)
        began -= 5000.0
        push(13)
        until("step", lambda: bridge.tally["steps"] == 1)
        (step,) = [line for line in said if "clock of the stream was set" in line]
        first = int(step.split()[-1])
        push(14)
        push(15, began + 14 * 0.05 + 0.0501)
        rows.upto(first + 2)
        del source  # and once more, with a channel too many
        until("gone", lambda: sum("is gone" in line for line in said) == 2)
        source = outlet("counts", UNITS + 1, rate=20.0)
        until("other", lambda: bridge.tally["found"] == 3)
        assert source.wait_for_consumers(WAIT_S)
        source.push_sample([0.0] * (UNITS + 1))
        until("unusable", lambda: bridge.tally["unusable"] == 1)
    came = {k: counts[k] for k in (*range(8), 9, 11)}
    came |= {first + k: counts[13 + k] for k in range(3)}
    same(rows, through_sdk(service, "lsl-offline", came))
    stamps = [rows.rows[k][1] for k in range(9)]
    assert np.allclose(np.diff(stamps), 0.05, atol=1e-4)
    tally = bridge.tally
    assert (tally["bins"], tally["repeated"], tally["markers"]) == (13, 1, 1)
    assert tally["gap"] == 3
    assert any("bins 8 to 10 did not come" in line for line in said)
    assert any(f"had {UNITS} channels before" in line for line in said)
    assert any("clock" in line and "±" in line for line in said)


def test_a_counter_in_the_stream_numbers_the_bins(service: Service) -> None:
    counts = np.random.default_rng(1).poisson(1.0, (6, UNITS))
    source = outlet("counted", UNITS + 1, "bin_index", *[f"unit{k}" for k in range(UNITS)])
    with bridging(service, "counted", "counted") as (bridge, _):
        rows = Rows("counted-out")
        assert source.wait_for_consumers(WAIT_S)
        for index in (0, 1, 2, np.nan, np.inf, 5):
            row = counts[index] if index in (0, 1, 2, 5) else counts[0]
            source.push_sample([float(index), *row.astype(float).tolist()])
        source.push_sample([6.0] * (UNITS + 1), timestamp=np.nan)
        rows.upto(5)
        until("unusable", lambda: bridge.tally["unusable"] == 3)
    assert bridge.tally["gap"] == 2
    same(rows, through_sdk(service, "c", {k: counts[k] for k in (0, 1, 2, 5)}))


def test_spikes_through_lsl_decode_as_their_bins_and_a_lost_source_is_missing(
    tmp_path: Path,
) -> None:
    """The window is 12 s long: what comes late is put in its place."""
    slow = make_model(tmp_path / "slow.safetensors", n_units=UNITS, horizon=50, bin_width=0.25)
    with serving(slow) as service:
        _spikes_through_lsl(service)


def _spikes_through_lsl(service: Service) -> None:
    source = outlet("units", 1, kind=pylsl.cf_int32)
    with bridging(service, "units", "units") as (bridge, said):
        rows = Rows("units-out")
        assert source.wait_for_consumers(WAIT_S)
        origin = bridge._session.origin_ns
        shift = pylsl.local_clock() - time.monotonic()
        bins: dict[int, Any] = {}

        def push(index: int, units: list[int]) -> None:
            """Spikes in the middle of a bin, once it is over."""
            at = origin / 1e9 + (index + 0.5) * 0.25 + shift
            until("the bin", lambda: pylsl.local_clock() > at + 0.125)
            for unit in units:
                source.push_sample([unit], timestamp=at)
            bins[index] = np.bincount(units, minlength=UNITS)

        push(0, [0, 1, 1])
        push(1, [])
        push(2, [4])
        rows.upto(2)
        until("spikes", lambda: bridge.tally["samples"] == 4)
        del source
        until("gone", lambda: any("is gone" in line for line in said))
        gone = time.monotonic()
        until("two bins without the source", lambda: time.monotonic() > gone + 0.6)
        source = outlet("units", 1, kind=pylsl.cf_int32)
        until("back", lambda: bridge.tally["found"] == 2)
        sent = bridge.tally["batches"]
        until("batches of the new source", lambda: bridge.tally["batches"] > sent + 1)
        assert source.wait_for_consumers(WAIT_S)
        last = int((time.monotonic_ns() - origin) // 250_000_000) + 1
        push(last, [2, 2])
        until("spikes", lambda: bridge.tally["samples"] == 6)
        rows.upto(bridge._session._next_bin + 1)  # it is answered after all that came before
    statuses = [STATUSES[int(s)] for s in rows.column("status")]
    lost = statuses.index("missing")
    assert lost >= 3
    assert statuses[lost:last].count("missing") >= 2
    assert statuses[:3] == ["ok"] * 3
    for index, status in enumerate(statuses):  # silent while the source was there
        if status != "missing":
            bins.setdefault(index, np.zeros(UNITS, np.int64))
    same(rows, through_sdk(service, "u", bins))


def test_a_stream_that_is_not_there_is_waited_for_and_said(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--session", "x", "--to", service.ingest, "--duration", "0.5"]
    assert main(["bridge", "lsl", "--stream", "nobody", *arguments]) == 0
    assert "nobody: nothing came" in capsys.readouterr().out
    assert main(["bridge", "carrier-pigeon", "--stream", "nobody", *arguments]) == 2
    assert "kind: expected one of lsl" in capsys.readouterr().err
