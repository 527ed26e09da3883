"""Spikes in: the binner, the session table, and the whole service with its journal."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ilqr_clients.answer import Answer
from ilqr_clients.sdk import ServiceClient, model_of
from ilqr_service.journal.verify import verify
from ilqr_service.sessions.table import SessionTable
from ilqr_service.work import Insert, Work
from ilqr_vae.errors import ShapeError
from ilqr_vae.protocol import messages
from ilqr_vae.protocol.spikes import SpikeBinner
from rig import make_model, serving
from test_sessions import MS, UNITS, answer, bin_, open_, refused, table

WIDTH = 50 * MS
ORIGIN = 7 * MS


class Batch(NamedTuple):
    index: int
    source_ns: int
    times: NDArray[np.int64]
    units: NDArray[np.int64]
    until_ns: int | None = None


def spike_times(counts: NDArray[Any], seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Spikes at random times that have these counts (T, N); rising."""
    rng = np.random.default_rng(seed)
    bins, units = np.nonzero(counts)
    bins, units = (np.repeat(x, counts[np.nonzero(counts)]) for x in (bins, units))
    times = ORIGIN + bins * WIDTH + rng.integers(0, WIDTH, len(bins))
    order = np.argsort(times, kind="stable")
    return times[order], units[order]


def batches_of(counts: NDArray[Any], cuts: Sequence[int], until: bool = True) -> list[Batch]:
    """A recording in batches that end at ``cuts`` (nanoseconds after the origin)."""
    times, units = spike_times(counts)
    end = ORIGIN + len(counts) * WIDTH
    edges = [ORIGIN, *(ORIGIN + c for c in sorted(cuts) if ORIGIN + c < end), end]
    found: list[Batch] = []
    for k, (a, b) in enumerate(itertools.pairwise(edges)):
        here = (times >= a) & (times < b)
        found.append(Batch(k, b, times[here], units[here], b if until else None))
    return found


def binner(n_units: int = 3, **options: Any) -> SpikeBinner:
    return SpikeBinner(n_units, WIDTH, ORIGIN, **options)


def state(b: SpikeBinner, n_bins: int) -> list[tuple[bool, list[float]]]:
    return [(b.complete(k), b.counts(k).tolist()) for k in range(n_bins)]


@st.composite
def recordings(draw: st.DrawFn) -> tuple[NDArray[np.int64], list[Batch], list[Batch]]:
    n_bins = draw(st.integers(1, 8))
    seed = draw(st.integers(0, 2**16))
    counts = np.random.default_rng(seed).poisson(0.7, (n_bins, 3))
    cuts = draw(st.lists(st.integers(1, n_bins * WIDTH), max_size=12, unique=True))
    batches = batches_of(counts, cuts, draw(st.booleans()))
    order = draw(st.permutations(batches))
    twice = draw(st.lists(st.sampled_from(batches), max_size=4))
    return counts, batches, [*order, *twice]


@settings(max_examples=80, deadline=None)
@given(recordings())
def test_any_order_of_the_batches_gives_the_counts_of_binning_offline(
    case: tuple[NDArray[np.int64], list[Batch], list[Batch]],
) -> None:
    counts, batches, order = case
    b = binner()
    final: dict[int, list[float]] = {}
    for batch in order:
        update = b.add(*batch)
        for index in (*update.revised, *update.closed):
            if b.complete(index):
                final[index] = b.counts(index).tolist()
    assert b.next_batch == len(batches)
    times, units = spike_times(counts)
    edges = ORIGIN + np.arange(len(counts) + 1) * WIDTH
    offline, _, _ = np.histogram2d(times, units, bins=(edges, np.arange(4) - 0.5))
    assert [final[k] for k in range(len(counts))] == offline.tolist()


@settings(max_examples=80, deadline=None)
@given(recordings(), st.data())
def test_what_is_known_depends_on_the_batches_that_came_and_not_on_their_order(
    case: tuple[NDArray[np.int64], list[Batch], list[Batch]], data: st.DataObject
) -> None:
    counts, batches, _ = case
    kept = data.draw(st.lists(st.sampled_from(batches), unique_by=lambda b: b.index, min_size=1))
    one, other = binner(), binner()
    for batch in kept:
        one.add(*batch)
    for batch in sorted(kept, key=lambda b: b.index):
        other.add(*batch)
    assert state(one, len(counts)) == state(other, len(counts))
    # what is said to be complete is right, whatever was lost
    for index, (complete, found) in enumerate(state(one, len(counts))):
        assert not complete or found == counts[index].tolist()


def test_silent_bins_are_zero_and_those_of_a_lost_batch_are_not_complete() -> None:
    b, none = binner(), np.zeros(0, np.int64)
    end = [b.end_ns(k) for k in range(6)]
    assert b.add(0, end[0], none, none, end[0]).closed == range(1)
    assert b.complete(0)
    update = b.add(2, end[4], none, none, end[4])  # batch 1 may hold spikes of bins 1 to 4
    assert update.closed == range(1, 5)
    assert [b.complete(k) for k in range(5)] == [True, False, False, False, False]
    update = b.add(1, end[1], np.array([end[1] - 1]), np.array([2]), end[1])
    assert update.revised == (1, 2, 3, 4)
    assert b.counts(1).tolist() == [0, 0, 1]
    # without a word from the feeder a bin closes a grace after its end
    c = binner(grace_ns=10 * MS)
    assert c.add(0, end[0] + 9 * MS, none, none).closed == range(0)
    assert c.add(1, end[0] + 10 * MS, none, none).closed == range(1)


@pytest.mark.parametrize(
    ("times", "units", "field"),
    [
        ([ORIGIN + 1], [3], "units"),
        ([ORIGIN + 1], [-1], "units"),
        ([ORIGIN + 1], [0, 1], "units"),
        ([ORIGIN + 1.5], [0], "times_ns"),
        ([ORIGIN + WIDTH + 1], [0], "times_ns"),
    ],
)
def test_a_batch_that_cannot_be_is_refused_whole(times: Any, units: Any, field: str) -> None:
    b = binner()
    with pytest.raises(ShapeError) as caught:
        b.add(0, ORIGIN + WIDTH, times, units)
    assert caught.value.field == field
    assert (b.next_batch, b.next_bin) == (0, 0)


# ---- the session table -------------------------------------------------------------------------


def spikes_(batch: Batch, **changes: Any) -> messages.Spikes:
    fields: dict[str, Any] = {
        "session": "s",
        "index": batch.index,
        "source_ns": batch.source_ns,
        "times_ns": messages.pack(batch.times, "<i8"),
        "units": messages.pack(batch.units, "<u2"),
        "until_ns": batch.until_ns,
    }
    return messages.Spikes(**(fields | changes))


def started(**limits: int) -> SessionTable:
    t = table(**limits)
    t.receive(b"f", open_(origin_ns=ORIGIN), 0)
    return t


def empty(index: int, bins: float) -> Batch:
    """A batch without spikes, sent and complete so many bins after the origin."""
    none, at = np.zeros(0, np.int64), ORIGIN + round(bins * WIDTH)
    return Batch(index, at, none, none, at)


def told(works: Sequence[Work]) -> list[tuple[str, int, list[float] | None]]:
    return [
        (type(w).__name__, w.index, None if w.counts is None else w.counts.tolist())  # type: ignore[union-attr]
        for w in works
    ]


def test_batches_become_bins_and_late_spikes_revise_them() -> None:
    t = started()
    first = Batch(0, ORIGIN + WIDTH, np.array([ORIGIN, ORIGIN]), np.array([0, 2]), ORIGIN + WIDTH)
    works = t.receive(b"f", spikes_(first), 0).work
    works += t.receive(b"f", spikes_(empty(1, 3)), 0).work
    assert told(works) == [
        ("Solve", 0, [1, 0, 1]),
        ("Solve", 1, [0, 0, 0]),
        ("Solve", 2, [0, 0, 0]),
    ]
    late = Batch(2, ORIGIN + 4 * WIDTH, np.array([ORIGIN + 5]), np.array([1]), ORIGIN + 3 * WIDTH)
    effects = t.receive(b"f", spikes_(late), 0)
    assert told(effects.work) == [("Insert", 0, [1, 1, 1])]
    assert [(run, batch.index) for run, batch in effects.fed] == [(0, 2)]
    assert refused(t.receive(b"f", spikes_(late), 0)).field == "index"
    for work in works:
        t.answered(answer(work), 1)
    assert t.waiting == 1


def test_bins_of_a_lost_batch_are_missing_until_it_comes() -> None:
    t = started()
    t.receive(b"f", spikes_(empty(0, 1)), 0)
    effects = t.receive(b"f", spikes_(empty(2, 2.5)), 0)
    assert effects.work == []  # bin 1 may be in batch 1
    assert effects.events["uncertain_bins"] == 1
    works = t.receive(b"f", spikes_(empty(3, 4)), 0).work
    assert told(works) == [
        ("Solve", 1, None),
        ("Solve", 2, None),  # batch 1 was sent before 2.5 bins had passed
        ("Solve", 3, [0, 0, 0]),
    ]
    one = Batch(
        1, ORIGIN + 2 * WIDTH, np.array([ORIGIN + WIDTH]), np.array([0]), ORIGIN + 2 * WIDTH
    )
    works = t.receive(b"f", spikes_(one), 0).work
    assert told(works) == [("Insert", 1, [1, 0, 0]), ("Insert", 2, [0, 0, 0])]


def test_a_silent_feeder_is_lost_and_a_silent_brain_is_not() -> None:
    t = table()
    t.receive(b"f", open_(origin_ns=ORIGIN, clocked=True, grace_ns=10 * MS), 0)
    assert told(t.receive(b"f", spikes_(empty(0, 1)), 100 * MS).work) == [("Solve", 0, [0, 0, 0])]
    assert told(t.receive(b"f", spikes_(empty(1, 2)), 150 * MS).work) == [("Solve", 1, [0, 0, 0])]
    assert t.next_due() == 210 * MS
    assert told(t.tick(210 * MS).work) == [("Solve", 2, None)]
    assert told(t.receive(b"f", spikes_(empty(2, 4)), 250 * MS).work) == [
        ("Insert", 2, [0, 0, 0]),
        ("Solve", 3, [0, 0, 0]),
    ]


def test_bins_that_were_answered_meanwhile_do_not_come_at_once() -> None:
    t = table(gap_limit=3)
    t.receive(b"f", open_(origin_ns=ORIGIN, clocked=True, grace_ns=10 * MS), 0)
    t.receive(b"f", spikes_(empty(0, 1)), 100 * MS)
    meanwhile: list[Work] = []
    while (due := t.next_due()) is not None and len(meanwhile) < 3:
        meanwhile += t.tick(due).work
    assert told(meanwhile) == [("Solve", k, None) for k in (1, 2, 3)]
    now = 100 * MS + 5 * WIDTH
    effects = t.receive(b"f", spikes_(empty(1, 6)), now)
    zeros = [0, 0, 0]
    assert told(effects.work) == [
        *[("Insert", k, zeros) for k in (1, 2, 3)],
        *[("Solve", k, zeros) for k in (4, 5)],
    ]
    assert effects.published == []


def test_bins_and_spikes_are_not_mixed_and_bad_batches_cost_themselves() -> None:
    t = started(credits=2)
    assert refused(t.receive(b"f", bin_(0), 0)).field == "bin"
    for changes, field in (
        ({"units": messages.pack(np.array([len(UNITS)]), "u1")}, "units"),
        ({"times_ns": messages.pack(np.array([0.5]), "<f8")}, "times_ns.dtype"),
        ({"times_ns": messages.pack(np.array([1, 2]), "<i8")}, "units.shape"),
        ({"until_ns": ORIGIN + 2 * WIDTH}, "until_ns"),
        ({"index": -1}, "index"),
    ):
        batch = Batch(0, ORIGIN + WIDTH, np.array([ORIGIN]), np.array([0]), ORIGIN)
        assert refused(t.receive(b"f", spikes_(batch, **changes), 0)).field == field
    assert len(t.receive(b"f", spikes_(empty(0, 2)), 0).work) == 2
    assert refused(t.receive(b"f", spikes_(empty(1, 3)), 0)).field == "credits"
    plain = table()
    plain.receive(b"f", open_(), 0)
    assert refused(plain.receive(b"f", spikes_(empty(0, 1)), 0)).field == "spikes"


def test_more_bins_at_once_than_a_gap_may_have_begin_again() -> None:
    t = started(gap_limit=3)
    t.receive(b"f", spikes_(empty(0, 1)), 0)
    effects = t.receive(b"f", spikes_(empty(1, 20)), 0)
    assert [w.index for w in effects.work] == [16, 17, 18, 19]
    (notice,) = effects.published
    assert isinstance(notice, messages.Notice)
    assert notice.what == "reset: bins 1 to 15 came at once and have no answers"
    assert not any(isinstance(w, Insert) for w in effects.work)


# ---- the service -------------------------------------------------------------------------------


def stream_bins(client: ServiceClient, counts: NDArray[Any]) -> list[Answer]:
    model = model_of(client.describe())
    with client.open("bins", units=model.unit_names, bin_width=model.bin_width) as session:
        return [session.step(k, row) for k, row in enumerate(counts)]


def vectors(answer: Answer) -> list[bytes]:
    return [getattr(answer, name).tobytes() for name in messages.VECTORS]


def test_spikes_decode_as_their_bins_do_over_a_restart_and_verify(tmp_path: Path) -> None:
    """Batches reordered, twice, one of them held back beyond its bins, the service killed between:
    the newest answers are those of the same counts sent as bins, to the last bit."""
    rng = np.random.default_rng(1)
    counts = rng.poisson(1.0, (40, 5))
    model = make_model(tmp_path / "m.safetensors", n_units=5, horizon=8)
    batches = batches_of(counts, list(range(0, 40 * WIDTH, 20 * MS)))
    half = len(batches) // 2
    order = [k for pair in zip(range(1, half, 2), range(0, half, 2), strict=True) for k in pair]
    order += [order[-1]]
    order += [k for k in range(half, len(batches)) if k != half + 3]
    order.insert(order.index(half + 9), half + 3)
    journal = str(tmp_path / "journal")
    newest: dict[int, Answer] = {}

    def feed(session: Any, part: list[int]) -> None:
        for k in part:
            session.send_raw(
                messages.encode(
                    spikes_(batches[k], session="spikes", epoch=3, token=session.request.token)
                )
            )

    def take(session: Any, last: int, revision: int = 0) -> None:
        while last not in newest or newest[last].revision < revision:
            got = session.receive(20.0)
            assert got, f"no answer for bin {last}: {sorted(newest)}, {session.refused}"
            for one in got:
                if one.index not in newest or newest[one.index].revision < one.revision:
                    newest[one.index] = one

    with serving(model, journal=journal) as service, ServiceClient(service.ingest) as client:
        expected = stream_bins(client, counts)
        session = client.open_spikes(
            "spikes",
            units=[f"unit{i}" for i in range(5)],
            bin_width=0.05,
            origin_ns=ORIGIN,
            epoch=3,
        )
        feed(session, order[: len(order) // 2])
        closed = max(batches[k].until_ns or 0 for k in order[: len(order) // 2])
        take(session, (closed - ORIGIN) // WIDTH - 1)
        crashed = shutil.copytree(journal, tmp_path / "crashed")  # as a kill leaves it
        session.abandon()
    with serving(model, journal=str(crashed)) as service, ServiceClient(service.ingest) as client:
        again = client.open_spikes(
            "spikes",
            units=[f"unit{i}" for i in range(5)],
            bin_width=0.05,
            origin_ns=ORIGIN,
            resume=True,
            answered=max(newest),
        )
        assert again.opened.resumed
        assert again.opened.next_batch == max(order[: len(order) // 2]) + 1
        feed(again, order[len(order) // 2 :])
        take(again, len(counts) - 1)
        again.close()
    assert [r.field for r in again.refused] == []
    assert sorted(newest) == list(range(len(counts)))
    for one, want in zip((newest[k] for k in sorted(newest)), expected, strict=True):
        assert vectors(one) == vectors(want)
        assert one.status != "missing"
    verdict = verify(crashed, [model])
    assert verdict.within(0.0)
    assert verdict.answers > 80
    assert verdict.skipped == 0
