"""Sessions whose feeder reconnects, pauses, drifts, or sends an index or a time that jumps."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from ilqr_service.sessions.effects import Effects
from ilqr_service.sessions.session import Limits
from ilqr_service.sessions.table import SessionTable
from ilqr_service.work import Solve
from ilqr_vae.protocol import messages
from test_sessions import INFO, MS, answer, bin_, open_, refused, started, table

WIDTH = INFO.bin_width_ns
DAY_NS = 86_400 * 1_000_000_000


def notices(effects: Effects) -> list[str]:
    return [m.what for m in effects.published if isinstance(m, messages.Notice)]


def indices(effects: Effects) -> list[int]:
    return [w.index for w in effects.work if not w.missing]


# ---- another connection ------------------------------------------------------------------------


def gone_after(*owners: bytes) -> SessionTable:
    """A table whose service no longer reaches these connections."""
    return SessionTable(INFO, Limits(), reaches=lambda owner, _: owner not in owners)


def test_a_session_follows_its_feeder_to_another_connection_by_its_token() -> None:
    t = table(credits=9)
    t.receive(b"f", open_(token="secret"), 0)
    t.receive(b"f", bin_(0, token="secret"), 1)
    effects = t.receive(b"g", bin_(2, token="secret"), 2)  # bin 1 was lost with the connection
    assert indices(effects) == [2]
    assert notices(effects) == ["reconnected: next bin 1"]
    assert effects.events["reconnected"] == 1
    ((owner, opened),) = effects.replies
    assert isinstance(opened, messages.Opened)
    assert (owner, opened.resumed, opened.next_index, opened.credits) == (b"g", True, 3, 7)
    for token in ("", "guess"):
        for owner in (b"f", b"g", b"h"):
            assert refused(t.receive(owner, bin_(3, token=token), 3)).field == "session"
    assert t.receive(b"g", messages.Close(session="s", token="secret"), 4).replies == []


def test_a_session_without_a_token_follows_once_the_old_connection_is_gone() -> None:
    t = gone_after(b"f")
    t.receive(b"f", open_(), 0)
    t.receive(b"f", bin_(0), 1)
    assert indices(t.receive(b"g", bin_(1), 2)) == [1]
    assert refused(t.receive(b"h", bin_(2), 3)).field == "session"  # g is connected


def test_somebody_else_who_wanted_the_name_does_not_get_the_session() -> None:
    t = gone_after(b"f")
    t.receive(b"f", open_(), 0, "alice")
    assert refused(t.receive(b"g", open_(), 1, "alice")).field == "epoch"
    assert refused(t.receive(b"g", bin_(0), 2, "alice")).field == "session"
    assert refused(t.receive(b"h", bin_(0), 2, "mallory")).field == "session"
    assert refused(t.receive(b"f", bin_(0), 2, "mallory")).field == "session"
    assert indices(t.receive(b"h", bin_(0), 2, "alice")) == [0]


def test_resuming_a_session_that_is_not_open_may_be_refused() -> None:
    t = table()
    assert refused(t.receive(b"f", open_(resume=True, begin=False), 0)).field == "session"
    assert len(t) == 0


def test_a_connected_feeders_session_is_not_resumed_without_its_token() -> None:
    t = table()
    t.receive(b"f", open_(token="secret"), 0)
    for token in ("", "guess"):
        assert refused(t.receive(b"g", open_(resume=True, token=token), 1)).field == "session"
    again = t.receive(b"f", open_(resume=True, token="secret"), 2)
    assert (again.published, again.events) == ([], Counter({"asked_again": 1}))
    t = gone_after(b"f")
    t.receive(b"f", open_(token="secret"), 0)
    assert t.receive(b"g", open_(resume=True, token="new"), 1).events["resumed"] == 1
    assert indices(t.receive(b"g", bin_(0, token="new"), 2)) == [0]


# ---- a jump ------------------------------------------------------------------------------------


def feed(t: SessionTable, bins: list[tuple[int, int]], start: int = 0) -> list[Effects]:
    """Bins as (index, source time), one a bin width."""
    effects: list[Effects] = []
    for k, (index, source_ns) in enumerate(bins, start):
        effects.append(t.receive(b"f", bin_(index, source_ns=source_ns), k * WIDTH))
        for work in effects[-1].work:
            t.answered(answer(work), k * WIDTH)
    return effects


def of(effects: list[Effects]) -> tuple[list[int], list[tuple[int, str]]]:
    """Indices accepted and (index, field) refused."""
    replies = [m for e in effects for _, m in e.replies if isinstance(m, messages.Refused)]
    return [i for e in effects for i in indices(e)], [(r.index, r.field) for r in replies]


@pytest.mark.parametrize("jump", [DAY_NS, -DAY_NS, 5_000 * MS])
@pytest.mark.parametrize("at", [1, 10])
def test_one_source_time_that_jumps_costs_one_bin(jump: int, at: int) -> None:
    t = started()
    bins = [(i, DAY_NS * 9 + i * WIDTH + (jump if i == at else 0)) for i in range(20)]
    accepted, lost = of(feed(t, bins))
    if at == 1:  # too little before it to tell which of the two is wrong: the next one tells
        assert (accepted, lost) == ([i for i in range(20) if i != 1], [(1, "source_ns")])
    else:
        assert (accepted, lost) == ([i for i in range(20) if i != at], [(at, "source_ns")])


@pytest.mark.parametrize("step", [DAY_NS, -DAY_NS])
def test_a_clock_that_is_set_costs_no_bin_and_is_reported(step: int) -> None:
    t = started()
    bins = [(i, DAY_NS * 9 + i * WIDTH + (step if i >= 10 else 0)) for i in range(20)]
    effects = feed(t, bins)
    assert of(effects) == (list(range(20)), [])
    assert [n for e in effects for n in notices(e)] == [
        f"clock: source times step by {step / 1e9:+.3f} s at bin 10"
    ]


@pytest.mark.parametrize(("delay", "pause"), [(2, 2), (3, 20), (60, 60), (60, 3)])
def test_a_bin_that_was_delayed_before_a_pause_costs_no_bin(delay: int, pause: int) -> None:
    """All stands still while a bin is on its way; the next bin arrives soon after it."""
    t = started()
    feed(t, [(i, i * WIDTH) for i in range(10)])
    delayed = t.receive(b"f", bin_(10, source_ns=10 * WIDTH), 10 * WIDTH + delay * 1000 * MS)
    later = max(delay, pause) * 1000 * MS + 11 * WIDTH
    after = t.receive(b"f", bin_(11, source_ns=later), later)
    assert of([delayed, after, t.tick(later + 250 * MS)]) == ([10, 11], [])


def test_a_first_source_time_that_is_wrong_costs_no_bin() -> None:
    bins = [(i, i * WIDTH + (DAY_NS if i == 0 else 0)) for i in range(10)]
    assert of(feed(started(), bins)) == (list(range(10)), [])


@pytest.mark.parametrize("ahead", [101, 2_000_000, 2**52])
def test_one_index_far_ahead_costs_one_bin(ahead: int) -> None:
    bins = [(i + (ahead if i == 10 else 0), i * WIDTH) for i in range(20)]
    accepted, lost = of(feed(started(), bins))
    assert accepted == [i for i in range(20) if i != 10]
    assert lost == [(10 + ahead, "index")]


def test_a_first_index_far_ahead_costs_one_bin() -> None:
    accepted, lost = of(feed(started(), [(999_999, 0), (1, WIDTH), (2, 2 * WIDTH)]))
    assert (accepted, lost) == ([1, 2], [(999_999, "index")])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_jump_that_the_next_bin_bears_out_costs_no_bin(order: tuple[int, int]) -> None:
    t = started()
    feed(t, [(i, i * WIDTH) for i in range(10)])
    jumped = [(5_000 + k, (10 + k) * WIDTH) for k in order]
    effects = feed(t, jumped, 10)
    assert indices(effects[-1]) == [5_000, 5_001]
    assert notices(effects[-1]) == ["reset: bins 10 to 4999 did not come and have no answers"]


def test_a_jump_that_lasted_as_long_as_its_bins_is_taken_at_once() -> None:
    t = started()
    feed(t, [(i, i * WIDTH) for i in range(10)])
    assert indices(feed(t, [(5_000, 5_000 * WIDTH)], 5_000)[0]) == [5_000]


def test_a_jump_is_decided_in_time_where_no_other_bin_comes() -> None:
    t = started()
    assert t.receive(b"f", bin_(5_000), 0).work == []  # nothing contradicts it: a counter goes on
    assert t.tick(249 * MS).work == []
    assert indices(t.tick(250 * MS)) == [5_000]
    t.receive(b"f", bin_(5_001), 251 * MS)
    assert t.receive(b"f", bin_(9_000), 252 * MS).work == []
    expired = t.tick(502 * MS)
    assert [m.index for _, m in expired.replies if isinstance(m, messages.Refused)] == [9_000]
    t.receive(b"f", bin_(9_000), 503 * MS)
    assert refused(t.receive(b"f", messages.Close(session="s"), 504 * MS)).index == 9_000


# ---- the timetable of a clocked session --------------------------------------------------------


def clocked(bins: list[tuple[int, float]], **limits: int) -> tuple[dict[int, bool], list[Effects]]:
    """Feed bins at times in bin widths, ticking each millisecond; which were used, and effects."""
    t = table(**({"credits": 10_000} | limits))
    t.receive(b"f", open_(clocked=True), 0)
    used: dict[int, bool] = {}
    effects: list[Effects] = []
    now = 0
    for index, at in sorted(bins, key=lambda b: b[1]):
        arrival = round(at * WIDTH) + MS
        steps = [(t.tick(ns), ns) for ns in range(now, arrival, MS)]
        steps.append((t.receive(b"f", bin_(index, source_ns=0), arrival), arrival))
        now = arrival
        for step, ns in steps:
            effects.append(step)
            effects += [t.answered(answer(work), ns) for work in step.work]
        used[index] = bool(indices(steps[-1][0]))
    return used, effects


def slips(effects: list[Effects]) -> int:
    told = sum(n.startswith("slipped: bin") for e in effects for n in notices(e))
    assert told == sum(e.events["slipped"] for e in effects)
    return told


def published(effects: list[Effects]) -> list[messages.Result]:
    """The results, after a check that none was given twice under a revision."""
    results = [m for e in effects for m in e.published if isinstance(m, messages.Result)]
    assert len({(r.index, r.revision) for r in results}) == len(results)
    return results


@pytest.mark.parametrize("pause", [0.8, 3, 6, 40, 99, 300, 1000])
def test_a_feeder_that_pauses_is_followed(pause: float) -> None:
    bins = [(i, i + (pause if i >= 60 else 0)) for i in range(400)]
    used, effects = clocked(bins)
    assert all(used.values())
    assert slips(effects) == 1
    newest = {r.index: r for r in sorted(published(effects), key=lambda r: r.revision)}
    assert {r.status for r in newest.values()} == {"ok"}
    assert sorted(newest) == list(range(400))
    if pause > INFO.horizon + 1:  # at the first bin after it, for all that was missing meanwhile
        last = 59 + min(round(pause), 100)
        late = f"slipped: bin 60 came {pause * 50:.0f} ms late, after a pause; bins 60 to {last} "
        assert [n for e in effects for n in notices(e) if n.startswith(late)]
        assert sum(r.revision > 0 for r in newest.values()) == min(round(pause), 100)


@pytest.mark.parametrize("pause", [6, 40, 99])
def test_a_feeder_that_pauses_and_goes_on_at_its_time_leaves_a_gap(pause: int) -> None:
    bins = [(i, i) for i in range(300) if not 60 <= i < 60 + pause]
    used, effects = clocked(bins)
    assert all(used.values())
    assert slips(effects) == 0
    missing = [r.index for r in published(effects) if r.status == "missing"]
    assert missing == list(range(60, 60 + pause))


def test_a_feeder_that_goes_on_further_on_after_a_pause_leaves_a_gap_before_it() -> None:
    t = table()
    t.receive(b"f", open_(clocked=True), 0)
    effects = [t.receive(b"f", bin_(i), i * WIDTH) for i in range(10)]
    effects.append(t.tick(40 * WIDTH))
    effects.append(t.receive(b"f", bin_(15), 40 * WIDTH))
    works = [w for e in effects for w in e.work]
    assert [w.index for w in works[-6:]] == [10, 11, 12, 13, 14, 15]
    assert [isinstance(w, Solve) and w.rewind for w in works[-6:]] == [True, *[False] * 5]
    assert indices(effects[-1]) == [15]
    effects += [t.answered(answer(w), 40 * WIDTH) for w in works]
    newest = {r.index: r for r in published(effects)}
    assert [newest[i].revision for i in (9, 10, 14, 15, 16)] == [0, 1, 1, 1, 0]
    # it came after another, so it follows no pause
    assert refused(t.receive(b"f", bin_(10), 41 * WIDTH)).field == "late"


@pytest.mark.parametrize("burst", [5, 50, 90])
def test_a_feeder_that_sends_in_bursts_is_used(burst: int) -> None:
    used, effects = clocked(
        [(i, (i // burst + 1) * burst + 0.01 * (i % burst)) for i in range(450)]
    )
    assert all(used.values())
    newest = {r.index: r for r in sorted(published(effects), key=lambda r: r.revision)}
    assert {newest[i].status for i in range(450)} == {"ok"}


def test_revisions_rise_after_a_pause_though_a_restart_knows_the_newest_answers_alone() -> None:
    t = table()
    t.receive(b"f", open_(clocked=True), 0)
    effects = [t.receive(b"f", bin_(i), i * WIDTH) for i in range(10)]
    effects.append(t.tick(40 * WIDTH))
    (session,) = t
    session.newest, session.known_from, session.revised_to = 39, 30, 3
    effects.append(t.receive(b"f", bin_(10), 40 * WIDTH))
    (result,) = published([t.answered(answer(effects[-1].work[0]), 41 * WIDTH)])
    assert (result.index, result.revision) == (10, 4)


@pytest.mark.parametrize("rate", [1.02, 1.05, 1.3, 2.0, 0.98, 0.5])
def test_a_slow_or_fast_feeders_bins_are_used(rate: float) -> None:
    jitter = np.random.default_rng(0).exponential(0.02, 500)
    used, effects = clocked([(i, i * rate + jitter[i]) for i in range(500)])
    assert all(used.values())
    assert slips(effects) == 0 if rate <= 1.1 else slips(effects) > 0
    missing = sum(e.events["overdue"] for e in effects)
    assert missing <= 10 if rate <= 1.1 else missing > 0


@pytest.mark.parametrize("stall", [3, 40])
def test_a_burst_after_a_stall_costs_nothing(stall: int) -> None:
    last = 60 + stall
    bins = [(i, max(i, last) + 0.001 * i if 60 <= i <= last else i) for i in range(300)]
    used, effects = clocked(bins)
    assert all(used.values())
    assert slips(effects) == (stall > INFO.horizon)  # it looks like a pause until the second bin
    missing = sum(e.events["overdue"] for e in effects)
    assert missing == stall  # the timetable is what it was


@pytest.mark.parametrize("ahead", [INFO.horizon, INFO.horizon + 1, 50, 99])
def test_one_index_ahead_in_a_clocked_session_costs_no_more_than_its_place(ahead: int) -> None:
    bins: list[tuple[int, Any]] = [(i + ahead if i == 60 else i, i) for i in range(300)]
    used, _ = clocked(bins)
    lost = {i for i in range(300) if not used.get(i)}
    assert lost == ({60} if ahead > INFO.horizon else {60, 60 + ahead})  # its place was taken
