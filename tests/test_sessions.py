"""The session table and the checks: pure, so time is whatever the test says."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from ilqr_service.sessions.effects import Effects
from ilqr_service.sessions.session import Limits
from ilqr_service.sessions.table import SessionTable
from ilqr_service.work import (
    FAILED,
    STOPPED,
    EngineAnswer,
    EngineInfo,
    Solve,
    Work,
    status_of,
)
from ilqr_vae.errors import ProtocolError
from ilqr_vae.protocol import messages
from ilqr_vae.protocol.arrays import DTYPES

MS = 1_000_000
UNITS = ("a", "b", "c")
INFO = EngineInfo(
    model="m",
    unit_names=UNITS,
    bin_width_ns=50 * MS,
    latents=2,
    kinematic_names=("vx",),
    kinematic_units=("m/s",),
    horizon=5,
    iterations=2,
)


def table(**limits: int) -> SessionTable:
    return SessionTable(INFO, Limits(**({"deadline_ns": 50 * MS} | limits)))


def open_(name: str = "s", **changes: Any) -> messages.Open:
    fields: dict[str, Any] = {
        "protocol": messages.PROTOCOL,
        "session": name,
        "units": UNITS,
        "bin_width_ns": 50 * MS,
        "deadline_ns": 50 * MS,
    }
    return messages.Open(**(fields | changes))


def bin_(at: int, **changes: Any) -> messages.Bin:
    fields: dict[str, Any] = {
        "session": "s",
        "index": at,
        "source_ns": 7,
        "counts": messages.pack(np.array([1, 0, 2]), "<u2"),
    }
    return messages.Bin(**(fields | changes))


def answer(work: Work, solver: str = "converged", start: int = 0, end: int = 1) -> EngineAnswer:
    return EngineAnswer(
        work=work,
        latent=np.zeros(2),
        latent_std=np.ones(2),
        rates=np.ones(3),
        kinematics=np.zeros(1),
        kinematics_std=np.ones(1),
        bits=1.5,
        spikes=3,
        iterations=2,
        solver=solver,
        solve_start_ns=start,
        solve_end_ns=end,
    )


def refused(effects: Effects) -> messages.Refused:
    (message,) = [m for _, m in effects.replies]
    assert isinstance(message, messages.Refused)
    assert sum(effects.events.values()) == 1
    assert not effects.work
    return message


def started(**limits: int) -> SessionTable:
    t = table(**limits)
    t.receive(b"f", open_(), 0)
    return t


# ---- opening -----------------------------------------------------------------------------------


def test_open_says_what_is_served_and_grants_credits() -> None:
    effects = table(credits=9).receive(b"f", open_(), 0)
    ((owner, opened),) = effects.replies
    assert owner == b"f"
    assert isinstance(opened, messages.Opened)
    assert (opened.model, opened.credits, opened.kinematic_names) == ("m", 9, ("vx",))
    assert effects.published == [messages.Notice(session="s", epoch=0, what="opened")]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"protocol": 99}, "protocol"),
        ({"session": "a b"}, "session"),
        ({"session": ""}, "session"),
        ({"session": "x" * 65}, "session"),
        ({"session": "s\n"}, "session"),
        ({"units": UNITS[:2]}, "units"),
        ({"units": ("a", "c", "b")}, "units[1]"),
        ({"bin_width_ns": 20 * MS}, "bin_width_ns"),
        ({"deadline_ns": -1}, "deadline_ns"),
        ({"clocked": True, "grace_ns": -1}, "grace_ns"),
        ({"grace_ns": 2**62}, "grace_ns"),
        ({"epoch": -1}, "epoch"),
    ],
)
def test_open_of_what_the_model_cannot_serve_is_refused(
    changes: dict[str, Any], field: str
) -> None:
    t = table()
    assert refused(t.receive(b"f", open_(**changes), 0)).field == field
    assert len(t) == 0


def test_open_session_needs_a_higher_epoch_and_then_drops_the_older_run() -> None:
    t = started()
    for feeder in (b"f", b"thief"):
        assert refused(t.receive(feeder, open_(), 1)).field == "epoch"
    (queued,) = t.receive(b"f", bin_(0), 2).work
    effects = t.receive(b"g", open_(epoch=1), 3)
    assert effects.forget == [queued.run]
    assert [n.what for n in effects.published if isinstance(n, messages.Notice)] == [
        "restarted: epoch 1",
        "opened",
    ]
    assert [(o, type(m)) for o, m in effects.replies] == [
        (b"f", messages.Closed),
        (b"g", messages.Opened),
    ]
    # what was being solved when the run ended goes nowhere
    late = t.answered(answer(queued), 9)
    assert late.published == []
    assert late.events == Counter({"dropped": 1})
    assert refused(t.receive(b"f", bin_(1), 4)).field == "session"
    assert refused(t.receive(b"g", bin_(0, epoch=0), 4)).field == "epoch"
    assert len(t.receive(b"g", bin_(0, epoch=1), 4).work) == 1


def test_only_so_many_sessions() -> None:
    t = table(max_sessions=2)
    for name in ("a", "b"):
        t.receive(b"f", open_(name), 0)
    assert refused(t.receive(b"f", open_("c"), 0)).field == "session"
    t.receive(b"f", messages.Close(session="a"), 0)
    assert len(t.receive(b"f", open_("c"), 0).published) == 1


# ---- bins --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"session": "unknown"}, "session"),
        ({"epoch": 3}, "epoch"),
        ({"index": -1}, "index"),
        ({"counts": messages.pack(np.zeros(2), "<u2")}, "counts.shape"),
        ({"counts": messages.pack(np.zeros((1, 3)), "<u2")}, "counts.shape"),
        ({"counts": messages.Array("<u2", (3,), b"12345")}, "counts.data"),
        ({"counts": messages.pack(np.array([0, 0.5, 1]), "<f8")}, "counts"),
        ({"counts": messages.pack(np.array([0, np.nan, 1]), "<f4")}, "counts"),
        ({"counts": messages.pack(np.array([0, np.inf, 1]), "<f8")}, "counts"),
        ({"counts": messages.pack(np.array([0, -1, 1]), "<i8")}, "counts"),
        ({"counts": messages.pack(np.array([0, 2**31, 1]), "<u4")}, "counts"),
        ({"mask": messages.pack(np.ones(2), "u1")}, "mask.shape"),
        ({"mask": messages.pack(np.array([0, 2, 1]), "u1")}, "mask"),
        ({"mask": messages.pack(np.ones(3), "<f8")}, "mask.dtype"),
    ],
)
def test_a_wrong_bin_is_refused_and_disturbs_nothing(changes: dict[str, Any], field: str) -> None:
    t = started()
    assert refused(t.receive(b"f", bin_(0, **changes), 1)).field == field
    (work,) = t.receive(b"f", bin_(0), 2).work
    assert (work.index, work.restart) == (0, True)


def test_bin_of_another_feeder_is_refused() -> None:
    t = started()
    assert refused(t.receive(b"thief", bin_(0), 1)).field == "session"
    assert t.credits() == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_counts_of_every_dtype_arrive_as_they_are(dtype: messages.DType) -> None:
    (work,) = (
        started().receive(b"f", bin_(0, counts=messages.pack(np.array([3, 0, 1]), dtype)), 1).work
    )
    assert work.counts is not None
    np.testing.assert_array_equal(work.counts, [3.0, 0.0, 1.0])
    assert work.counts.dtype == np.float64


def test_a_gap_is_answered_first_as_missing() -> None:
    t = started()
    effects = t.receive(b"f", bin_(3), 10)
    assert [w.index for w in effects.work] == [0, 1, 2, 3]
    assert [w.missing for w in effects.work] == [True, True, True, False]
    assert [w.restart for w in effects.work] == [True, False, False, False]
    assert effects.events == Counter({"gap": 1, "gap_bins": 3})
    published = [t.answered(answer(w), 20).published[0] for w in effects.work]
    results = [r for r in published if isinstance(r, messages.Result)]
    assert [r.status for r in results] == ["missing"] * 3 + ["ok"]
    # results are kept, and the garbage collector visits each tuple in them
    assert len({id(r.rates.shape) for r in results}) == 1
    ((_, credit),) = t.credits()
    assert (credit.credits, credit.index) == (1, 3)  # bins that never came hold no credit


def test_a_gap_too_long_starts_the_estimate_again() -> None:
    t = started(gap_limit=4)
    t.receive(b"f", bin_(0), 0)
    assert len(t.receive(b"f", bin_(5), 1).work) == 5
    assert t.receive(b"f", bin_(11), 2).work == []  # until another bin bears it out
    effects = t.receive(b"f", bin_(12), 3)
    assert [(w.index, w.restart) for w in effects.work] == [(11, True), (12, False)]
    assert effects.events["reset"] == 1
    (notice,) = effects.published
    assert isinstance(notice, messages.Notice)
    assert notice.what.startswith("reset: bins 6 to 10 ")


def test_duplicates_are_refused_and_give_their_credit_back() -> None:
    t = started()
    (work,) = t.receive(b"f", bin_(0), 0).work
    for _ in range(2):
        assert refused(t.receive(b"f", bin_(0), 1)).field == "index"
    ((_, credit),) = t.credits()
    assert credit.credits == 2
    t.answered(answer(work), 1)
    ((_, credit),) = t.credits()
    assert credit.credits == 1


def test_bins_beyond_the_credits_are_shed() -> None:
    t = started(credits=2)
    works = [w for i in range(2) for w in t.receive(b"f", bin_(i), 0).work]
    assert refused(t.receive(b"f", bin_(2), 0)).field == "credits"
    t.answered(answer(works[0]), 1)
    assert [w.index for w in t.receive(b"f", bin_(3), 2).work] == [2, 3]


# ---- statuses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "solver", "published", "status"),
    [
        ({}, "converged", 100, "ok"),
        ({}, "iteration_limit", 100, "ok"),
        ({}, "converged", 101, "late"),
        ({}, STOPPED, 100, "degraded"),
        ({}, STOPPED, 101, "late"),
        ({}, FAILED, 101, "extrapolated"),
        ({}, "not_finite", 5, "extrapolated"),
        ({"mask": np.zeros(3, dtype=bool)}, "converged", 5, "extrapolated"),
        ({"counts": None}, STOPPED, 101, "missing"),
    ],
)
def test_status_is_a_function_of_the_answer_and_the_clock(
    changes: dict[str, Any], solver: str, published: int, status: str
) -> None:
    fields: dict[str, Any] = {
        "run": 0,
        "index": 0,
        "counts": np.zeros(3),
        "mask": None,
        "restart": True,
        "source_ns": 0,
        "received_ns": 0,
        "due_ns": 100,
        "anytime": False,
    }
    assert status_of(answer(Solve(**(fields | changes)), solver), published) == status


# ---- ends --------------------------------------------------------------------------------------


def test_close_waits_for_what_is_queued_and_then_frees_the_name() -> None:
    t = started()
    (work,) = t.receive(b"f", bin_(0), 0).work
    assert t.receive(b"f", messages.Close(session="s"), 1).replies == []
    assert refused(t.receive(b"f", bin_(1), 1)).field == "session"
    effects = t.answered(answer(work), 2)
    assert [type(m) for m in effects.published] == [messages.Result, messages.Notice]
    credit, closed = (m for _, m in effects.replies)
    assert isinstance(credit, messages.Credit)
    assert credit.credits == 2  # one answered, one refused
    assert closed == messages.Closed(session="s", epoch=0, bins=1, reason="closed")
    assert effects.forget == [work.run]
    (again,) = t.receive(b"f", open_(), 3).replies
    assert isinstance(again[1], messages.Opened)


def test_idle_sessions_end_with_a_notice_but_not_while_bins_are_queued() -> None:
    t = started(idle_ns=10)
    (work,) = t.receive(b"f", bin_(0), 5).work
    assert t.tick(1000).published == []
    t.answered(answer(work), 1000)
    effects = t.tick(1001)
    assert effects.published == [messages.Notice(session="s", epoch=0, what="idle")]
    assert len(t) == 0


def test_draining_refuses_what_is_new_and_answers_what_is_queued() -> None:
    t = started()
    (work,) = t.receive(b"f", bin_(0), 0).work
    t.drain("shutting down")
    for message in (bin_(1), open_("t")):
        assert refused(t.receive(b"f", message, 1)).got == "shutting down"
    assert len(t.answered(answer(work), 2).published) == 1
    effects = t.end_all("shutdown")
    assert effects.published == [messages.Notice(session="s", epoch=0, what="shutdown")]
    assert t.waiting == 0


def test_refusal_quotes_no_more_than_a_little() -> None:
    error = ProtocolError("message", expected="x", got="y" * 10_000)
    message = refused(Effects.refusal(b"f", error, "s" * 999))
    assert len(message.got) <= 200
    assert len(message.session) <= 64
