"""Four times too much load, in a time of its own: the table and the policy as they are, a solver
that takes exactly so long. What a real process makes of it is in ``test_chaos_load.py``."""

from __future__ import annotations

from collections import Counter

import pytest

from ilqr_service.solving.policy import Cost, Policy
from ilqr_service.work import NO_SOLVE, SHED, Insert, Solve, Work
from ilqr_vae.protocol import messages
from test_sessions import INFO, MS, answer, bin_, open_, table

SESSIONS = 4
SOLVE = 6 * MS  # so that sessions in real time are half of what the solver can do
PASS_BY = SOLVE // 30
WINDOW = INFO.horizon * INFO.bin_width_ns


class Overload:
    """Bins by plan, a solver that is free or not, and all answers.

    Attributes:
        answers: status and solver of each first answer, by session and index, and when.
        longest: works queued of all sessions, at most.
    """

    def __init__(self, *, anytime: bool) -> None:
        self.table = table(credits=16, gap_limit=20, backlog=36)
        self.policy = Policy(lambda _: Cost(INFO.bin_width_ns, INFO.horizon, 1, 0.0, SOLVE))
        self.answers: dict[tuple[str, int], tuple[str, str, int]] = {}
        self.refused = Counter[str]()
        self.longest = 0
        self.now = 0
        for k in range(SESSIONS):
            self.table.receive(b"f", open_(f"s{k}", anytime=anytime), 0)

    def run(self, plan: list[tuple[int, str, int]]) -> None:
        """Arrivals (ns, session, index) in order of time, and then what is queued."""
        for at, session, index in plan:
            while self.now < at and len(self.policy):
                self._solve()
            self.now = max(self.now, at)
            # the service stamps what it takes off its socket: nothing waits there unseen
            effects = self.table.receive(b"f", bin_(index, session=session), at)
            for _, message in effects.replies:
                assert isinstance(message, messages.Refused)
                self.refused[message.field] += 1
            assert not effects.published  # no reset: every index gets its answer
            for work in effects.work:
                self.policy.push(work)
            for run in effects.overran:
                self.policy.overran(run)
            self.longest = max(self.longest, len(self.policy))
        while len(self.policy):
            self._solve()

    def _solve(self) -> None:
        rounds = self.policy.shed(self.now, 128)
        for works in (*rounds, self.policy.take(1)):
            for work in works:
                shed = isinstance(work, Solve) and work.budget == NO_SOLVE
                self.now += PASS_BY if shed else SOLVE
                self._answer(work, SHED if shed else "converged")

    def _answer(self, work: Work, solver: str) -> None:
        assert isinstance(work, Solve | Insert)
        for message in self.table.answered(answer(work, solver=solver), self.now).published:
            assert isinstance(message, messages.Result)
            key = (message.session, message.index)
            assert key not in self.answers
            self.answers[key] = (message.status, message.solver, self.now)


@pytest.mark.parametrize("anytime", [True, False])
def test_overload_is_shed_and_over_within_a_window(anytime: bool) -> None:
    bins, calm, width = 1600, 100, INFO.bin_width_ns
    fall = bins * width // 8
    plan = [
        (min(i, bins) * width // 8 + max(0, i - bins) * width + k, f"s{k}", i)
        for i in range(bins + calm)
        for k in range(SESSIONS)
    ]
    load = Overload(anytime=anytime)
    load.run(sorted(plan))
    assert set(load.answers) == {(f"s{k}", i) for k in range(SESSIONS) for i in range(bins + calm)}
    flags = Counter((status, solver) for status, solver, _ in load.answers.values())
    assert set(flags) <= {
        ("ok", "converged"),
        ("late", "converged"),
        ("extrapolated", SHED),
        ("missing", SHED),
        ("missing", "converged"),
    }
    flood = [a for (_, i), a in load.answers.items() if i < bins]
    shed = sum(solver == SHED for _, solver, _ in flood)
    assert 0.6 * len(flood) < shed < 0.9 * len(flood)
    # solves go to bins that can still be in time
    in_time = sum(status == "ok" for status, _, _ in flood)
    assert in_time > 0.5 * (len(flood) - shed)
    # what the flood left is gone a window after it, and most of it at once
    late = [(i, a) for (_, i), a in load.answers.items() if i >= bins and a[0] != "ok"]
    assert all(at < fall + WINDOW for _, (_, _, at) in late), late
    assert load.longest <= SESSIONS * (16 + 36)
    assert anytime == (not load.refused)  # a feeder that goes beyond its credits is told so


def test_a_feeder_within_its_credits_is_never_shed() -> None:
    """However late its answers: they depend on its bins, not on the clock."""
    load = Overload(anytime=False)
    sent = Counter[str]()
    for turn in range(400):
        session = f"s{turn % SESSIONS}"
        if sent[session] - sum(name == session for name, _ in load.answers) >= 16:
            load.run([])
        load.run([(load.now, session, sent[session])] if turn % 7 else [])
        sent[session] += turn % 7 > 0
    load.run([])
    assert {solver for _, solver, _ in load.answers.values()} == {"converged"}
    assert not load.refused


def test_what_a_step_costs_is_followed() -> None:
    cost = Cost(50_000_000, 5, 256, 0.0, 1.0)
    cost.measured(one=1e6, many=5e6, bins=9)
    assert (cost.ns(0), cost.ns(1), cost.ns(9)) == (0.0, 1e6, 5e6)
    for _ in range(200):
        cost.learn(3, 4e6)
    assert cost.ns(3) == pytest.approx(4e6, rel=0.01)
    cost.measured(one=1e6, many=1e8, bins=2)  # the machine was busy with something else then
    for _ in range(200):
        cost.learn(1, 1e6)
    assert cost.ns(1) == pytest.approx(1e6, rel=0.01)
    cost.measured(one=1e6, many=1e6, bins=1)
    assert cost.ns(2) == 2e6
