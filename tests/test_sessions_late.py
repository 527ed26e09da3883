"""The session table: late bins, the clock, resuming, shedding, slots."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from msgspec import structs

from ilqr_service.work import NO_SOLVE, SHED, Insert, SwapModel
from ilqr_vae.protocol import messages
from test_sessions import INFO, MS, answer, bin_, open_, refused, started, table


def test_a_late_bin_is_put_in_its_place_within_the_window_only() -> None:
    t = started()
    works = t.receive(b"f", bin_(6), 0).work
    for work in works:
        t.answered(answer(work), 1)
    assert refused(t.receive(b"f", bin_(1), 2)).field == "late"  # the window is of 5 bins: 2 to 6
    (late,) = t.receive(b"f", bin_(4), 2).work
    assert (late.index, type(late), late.serial) == (4, Insert, 7)
    assert refused(t.receive(b"f", bin_(4), 3)).field == "index"  # now a duplicate
    assert t.waiting == 1
    published: list[Any] = []
    for work, settles in ((late, False), (works[5], False), (works[6], True)):
        again = structs.replace(answer(work), revised=True, settles=settles, due_ns=late.due_ns)
        published += t.answered(again, 5).published
    assert [(r.index, r.revision, r.status) for r in published] == [
        (4, 1, "ok"),
        (5, 1, "missing"),
        (6, 1, "ok"),
    ]
    assert t.waiting == 0
    assert sum(c.credits for _, c in t.credits()) == 4  # four bins came, two were refused
    (info,) = t.infos(9)
    assert (info.bins, info.revised) == (7, 3)


def test_a_clocked_session_answers_what_does_not_come_in_time() -> None:
    t = table(gap_limit=3)
    t.receive(b"f", open_(clocked=True, grace_ns=10 * MS), 0)
    assert t.next_due() is None
    t.receive(b"f", bin_(0), 100 * MS)
    assert t.next_due() == 160 * MS
    assert t.tick(159 * MS).work == []
    (work,) = t.tick(160 * MS).work
    assert (work.index, work.missing) == (1, True)
    assert t.next_due() == 210 * MS
    (late,) = t.receive(b"f", bin_(1), 170 * MS).work  # corrected, and the time table holds
    assert (late.index, type(late)) == (1, Insert)
    assert t.next_due() == 210 * MS
    assert [w.index for w in t.tick(10_000 * MS).work] == [2, 3, 4]
    assert t.next_due() is None  # silent for too long: it waits
    assert [w.index for w in t.receive(b"f", bin_(6), 10_001 * MS).work] == [5, 6]
    assert t.next_due() is not None


def test_resuming_takes_a_session_over_where_it_stands() -> None:
    t = table(credits=9)
    t.receive(b"f", open_(), 0)
    first, second = (t.receive(b"f", bin_(i), 0).work[0] for i in range(2))
    (result,) = t.answered(answer(first), 1).published
    effects = t.receive(b"g", open_(resume=True, answered=-1), 2)
    ((owner, opened),) = effects.replies
    assert isinstance(opened, messages.Opened)
    assert (owner, opened.next_index, opened.resumed, opened.credits) == (b"g", 2, True, 8)
    assert effects.again == [result]
    assert t.receive(b"h", open_(resume=True, answered=0), 2).again == []
    assert refused(t.receive(b"g", bin_(2), 3)).field == "session"
    t.answered(answer(second), 4)
    ((owner, credit),) = t.credits()
    assert (owner, credit.credits) == (b"h", 1)
    (begun,) = t.receive(b"h", open_("new", resume=True), 5).replies
    assert isinstance(begun[1], messages.Opened)
    assert not begun[1].resumed


def test_a_gap_before_a_crowded_session_is_answered_without_solves() -> None:
    t = table(gap_limit=100, credits=3, backlog=10)
    t.receive(b"f", open_(), 0)
    assert [w.budget for w in t.receive(b"f", bin_(8), 0).work] == [0] * 9
    effects = t.receive(b"f", bin_(12), 1)
    assert [(w.index, w.restart, w.budget) for w in effects.work] == [
        *((i, False, NO_SOLVE) for i in (9, 10, 11)),
        (12, False, 0),
    ]
    assert effects.events == Counter({"gap": 1, "gap_bins": 3})
    assert effects.work[-1].sheds  # and what was queued before may be shed from here on


def test_gaps_of_a_session_far_behind_are_not_answered() -> None:
    t = table(gap_limit=10, credits=30, backlog=10)
    t.receive(b"f", open_(), 0)
    queued = [len(t.receive(b"f", bin_(index), 0).work) for index in (9, 19, 29)]
    assert queued == [10, 10, 10]
    effects = t.receive(b"f", bin_(39), 0)
    assert [(w.index, w.restart) for w in effects.work] == [(39, True)]
    (notice,) = effects.published
    assert notice.what.startswith("reset: bins 30 to 38 ")


def test_a_session_beyond_its_credits_sheds_until_it_was_in_time_for_a_window() -> None:
    t = table(credits=2)
    t.receive(b"f", open_(), 0)
    first, second = (t.receive(b"f", bin_(i), 0).work[0] for i in range(2))
    assert not second.sheds
    effects = t.receive(b"f", bin_(2), 0)
    assert (refused(effects).field, effects.overran) == ("credits", [first.run])
    t.answered(answer(first), 1)
    t.answered(structs.replace(answer(second), solver=SHED), 1)
    sheds: list[bool] = []
    for index in range(2, 2 * INFO.horizon + 4):
        works = t.receive(b"f", bin_(index), index).work
        sheds.append(works[-1].sheds)
        late = index == INFO.horizon  # then it takes another window
        t.answered(answer(works[-1]), index + (51 * MS if late else 1))
    assert sheds == [index <= 2 * INFO.horizon for index in range(2, 2 * INFO.horizon + 4)]


def test_slots_serve_sessions_by_name_or_model_and_swap_at_a_bin() -> None:
    t = table()
    t.slots["fine"] = replace(INFO, model="other", bin_width_ns=20 * MS)
    assert refused(t.receive(b"f", open_(model="nothing"), 0)).field == "model"
    for name, model in (("a", "fine"), ("b", "other")):
        assert t.receive(b"f", open_(name, model=model, bin_width_ns=20 * MS), 0).opened
    t.receive(b"f", open_("c"), 0)
    t.receive(b"f", bin_(0, session="a"), 0)
    swapped = t.swap("fine", replace(t.slots["fine"], model="newer")).work
    assert [(w.to, w.model, w.serial) for w in swapped if isinstance(w, SwapModel)] == [
        ("newer", "other", 1),
        ("newer", "other", 0),
    ]
    (work,) = t.receive(b"f", bin_(1, session="a"), 1).work
    assert (work.model, work.serial) == ("newer", 2)
