"""Bins of many runs in one step: no run ever changes another's answer, not by a bit."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from feeder import UNITS
from ilqr_service.journal.verify import computed
from ilqr_service.settings import ServiceSettings
from ilqr_service.solving.engine import Engine
from ilqr_service.solving.engines import Engines
from ilqr_service.solving.policy import Cost, Policy, Quota, steps
from ilqr_service.solving.pool import Pool
from ilqr_service.solving.run import unpack_work
from ilqr_service.solving.warm_up import warm_up
from ilqr_service.work import FAILED, NO_SOLVE, SHED, STOPPED, EngineAnswer, Insert, Solve, Work
from ilqr_vae.kernels import backend
from ilqr_vae.kernels.cpu import threads
from ilqr_vae.streaming.state import HorizonState
from rig import make_model

N = len(UNITS)
H = 5
RUNS = 6


@pytest.fixture(scope="module", params=[1, 2], ids=["one model", "an ensemble"])
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    path = tmp_path_factory.mktemp("batch") / "m.safetensors"
    make_model(path, n_units=N, names=UNITS, horizon=H, members=request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "WORTH_A_THREAD", 1)  # small as the model is, share it out
        yield Engine.load(path, ServiceSettings(device="cpu", iterations=3))
    threads.use(None)


def work(run: int, index: int, kind: str, serial: int = 0) -> Solve:
    """A bin of a run; what is in it follows from the three alone."""
    rng = np.random.default_rng([run, index])
    counts = rng.poisson(1.0, N).astype(np.float64)
    one = Solve(
        run=run, index=index, counts=counts, restart=index == 0, due_ns=2**62, serial=serial
    )
    match kind:
        case "masked":
            return msgspec.structs.replace(one, mask=rng.random(N) < 0.5)
        case "missing":
            return msgspec.structs.replace(one, counts=None)
        case "cut":  # as a replay repeats what the clock had cut short
            return msgspec.structs.replace(one, budget=1 + run % 2)
        case "overdue":
            return msgspec.structs.replace(one, anytime=True, due_ns=0)
        case "shed":
            return msgspec.structs.replace(one, budget=NO_SOLVE)
        case "again":
            return msgspec.structs.replace(one, restart=True)
        case "watched":
            return msgspec.structs.replace(one, watch=True)
        case "not a number":
            return msgspec.structs.replace(
                one, counts=np.where(rng.random(N) < 0.3, np.nan, counts)
            )
        case "wrong size":
            return msgspec.structs.replace(one, counts=np.ones(N + 2))
        case _:
            return one


def late(run: int, index: int, serial: int = 0) -> Insert:
    """A bin that comes late."""
    counts = work(run, index, "plain").counts
    return Insert(run=run, index=index, counts=counts, due_ns=2**62, serial=serial)


def solve(engine: Engine, works: list[Work]) -> list[EngineAnswer]:
    """Works of different runs, split into steps; answers by run."""
    answers = [a for step in steps(works, lambda _: engine.cost) for a in engine.solve(step)]
    return sorted(answers, key=lambda a: a.work.run)


def held(answer: EngineAnswer) -> tuple[bytes, str, int, bool, tuple[str, ...]]:
    """What must be the same to the last bit."""
    numbers = computed(answer).tobytes()
    return numbers, answer.solver, answer.work.index, answer.revised, answer.flags


KINDS = (
    "plain", "plain", "masked", "missing", "cut", "overdue", "again", "watched",
    "not a number", "wrong size", "late", "packed", "shed",
)  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(
    rounds=st.lists(
        st.lists(
            st.tuples(st.integers(0, RUNS - 1), st.sampled_from(KINDS)),
            min_size=1,
            max_size=RUNS,
            unique_by=lambda one: one[0],
        ),
        min_size=1,
        max_size=14,
    ),
    shared=st.integers(1, 3),
)
def test_a_batch_of_any_composition_is_each_alone(
    engine: Engine, rounds: list[list[tuple[int, str]]], shared: int
) -> None:
    threads.use(shared)
    for run in range(2 * RUNS):
        engine.forget(run)
    index, lost = [0] * RUNS, [set[int]() for _ in range(RUNS)]
    for serial, chosen in enumerate(rounds):
        works: list[Work] = []
        for run, kind in chosen:
            whole = all(w.missing or np.isfinite(w.counts).all() for w in engine.window(run))
            # (what is not a number has no place on the wire, nor in a snapshot)
            if kind == "packed" and whole and (packed := engine.pack(run)) is not None:
                engine.restore(packed)
            if kind == "late" and lost[run]:
                place = max(lost[run])
                lost[run].discard(place)
                works.append(late(run, place, serial))
                continue
            one = work(run, index[run], kind, serial)
            works.append(one)
            if one.counts is None:
                lost[run].add(index[run])
            index[run] += 1
        together = solve(engine, works)
        # their twins, runs of other numbers, one by one
        alone = [
            answer
            for one in sorted(works, key=lambda w: w.run)
            for answer in engine.solve([msgspec.structs.replace(one, run=one.run + RUNS)])
        ]
        assert [held(a) for a in together] == [held(a) for a in alone]


def test_a_run_whose_state_is_broken_hurts_no_neighbour(engine: Engine) -> None:
    for run in (100, 101, 102):
        for index in range(3):
            engine.solve([work(run, index, "plain")])
    packed = engine.pack(101)
    assert packed is not None
    broken = tuple((d, s, b"\xff" * len(raw)) for d, s, raw in packed.state[1:])  # NaN throughout
    engine.forget(101)
    engine.restore(
        type(packed)(101, packed.model, packed.serial, (packed.state[0], *broken), (), ())
    )
    bins = [work(100, 3, "plain"), work(101, 3, "plain"), work(102, 3, "plain")]
    first, second, third = engine.solve(bins)
    assert (first.restarted, second.restarted, third.restarted) == (False, True, False)
    for answer in (first, second, third):
        assert np.isfinite(computed(answer)).all()
        twin = answer.work.run + 100
        for index in range(3 if answer.restarted else 0, 4):  # the broken one has lost its past
            (alone,) = engine.solve(
                [msgspec.structs.replace(work(answer.work.run, index, "plain"), run=twin)]
            )
        assert held(answer) == held(alone)
    (begun,) = engine.solve([work(101, 4, "plain")])  # it begins again
    assert begun.solver not in (FAILED, "not_finite")


def test_the_reference_path_takes_one_run_at_a_time(engine: Engine, tmp_path: Path) -> None:
    """Its sums over a batch are torch's, whose order may depend on the batch."""
    path = make_model(tmp_path / "m.safetensors", n_units=N, names=UNITS, horizon=H)
    with backend.using("reference"):
        plain = Engine.load(path, ServiceSettings(device="cpu"))
        together = solve(plain, [work(run, 0, "plain") for run in range(3)])
        alone = [plain.solve([work(run + 10, 0, "plain")])[0] for run in range(3)]
    assert plain.cost.batch == 1
    assert all(a.solver == b.solver for a, b in zip(together, alone, strict=True))
    assert engine.cost.batch >= 1


def test_a_solve_cut_short_in_company_says_so_for_itself_alone(engine: Engine) -> None:
    cut, whole = engine.solve([work(200, 0, "overdue"), work(201, 0, "plain")])
    assert (cut.iterations, cut.solver) == (1, STOPPED)
    assert whole.iterations > 1


def test_a_bin_that_is_shed_is_in_the_window_all_the_same(engine: Engine) -> None:
    def last(kind: str) -> EngineAnswer:
        engine.forget(500)
        for index in range(2 * H):
            engine.solve([work(500, index, "plain")])
        for index in range(2 * H, 3 * H):
            engine.solve([work(500, index, kind)])
        for index in range(3 * H, 5 * H):
            (answer,) = engine.solve([work(500, index, "plain")])
        return answer

    (shed,) = engine.solve([work(501, 0, "shed")])
    assert (shed.solver, shed.iterations) == (SHED, 0)
    assert np.isfinite(shed.rates).all()
    assert np.isnan(shed.latent_std).all()
    whole, without, missing = last("plain"), last("shed"), last("missing")
    near, far = (np.abs(a.latent - whole.latent).max() for a in (without, missing))
    assert near < 0.01  # the arrival cost was linearised on a prediction, that is all
    assert near < far


def test_rows_are_free_when_nothing_refers_to_them(engine: Engine) -> None:
    """Memory does not grow with bins, nor with runs that come and go."""
    pool = engine._stepper.pool  # pyright: ignore[reportPrivateUsage]
    for run in list(engine._runs):  # pyright: ignore[reportPrivateUsage]
        engine.forget(run)
    gc.collect()
    assert len(pool) == 1  # the state that every run begins with
    capacity = pool.capacity
    for round_ in range(3):
        runs = range(300 + 10 * round_, 310 + 10 * round_)
        for index in range(3 * H):
            engine.solve([work(run, index, "plain") for run in runs])
        solve(engine, [late(run, 0) for run in runs])
        assert len(pool) == 1 + len(runs) * (H + 1)  # the window's states and the newest
        for run in runs:
            engine.forget(run)
        assert len(pool) == 1
    assert pool.capacity == capacity


def test_batches_of_all_sizes_and_kinds_compile_nothing_once_warm(model_file: Path) -> None:
    """And the states stay in the memory where they are."""
    from ilqr_vae.kernels.cpu import iteration
    from ilqr_vae.kernels.cpu import step as steps

    entries: tuple[Any, ...] = (steps.step, steps.predict_only, iteration.solve)
    engine = Engine.load(model_file, ServiceSettings(device="cpu", max_sessions=40))
    warm_up(engine)
    engine.solve([work(run, 0, "plain") for run in range(40)])
    compiled = [len(entry.nopython_signatures) for entry in entries]
    pool = engine._stepper.pool  # pyright: ignore[reportPrivateUsage]
    places = [view.ctypes.data for view in pool.views()]
    rng = np.random.default_rng(0)
    bins = dict.fromkeys(range(40), 0)
    kinds = ("plain", "masked", "missing", "cut", "overdue", "shed", "watched")
    for _ in range(60):
        runs = rng.permutation(40)[: rng.integers(1, 41)].tolist()
        for run in runs:
            bins[run] += 1
        answers = solve(engine, [work(run, bins[run], str(rng.choice(kinds))) for run in runs])
        assert len(answers) == len(runs)
        assert FAILED not in {answer.solver for answer in answers}
    assert [len(entry.nopython_signatures) for entry in entries] == compiled
    assert [view.ctypes.data for view in pool.views()] == places


def test_a_pool_grows_and_keeps_what_it_holds(engine: Engine) -> None:
    like = engine._stepper.pool.get([engine._stepper.initial])  # pyright: ignore[reportPrivateUsage]

    def state(k: int) -> HorizonState:
        return dataclasses.replace(like, z=torch.full_like(like.z, k))

    pool = Pool(like, 64)
    rows = [pool.put(state(k))[0] for k in range(300)]
    assert (len(pool), pool.capacity >= 300) == (300, True)
    assert pool.get(rows).z.flatten(1)[:, 0].tolist() == [float(k) for k in range(300)]
    del rows[:100]
    assert len(pool) == 200
    assert pool.get(rows[:1]).z.flatten()[0] == 100.0


def cost_of(start: float, each: float) -> Cost:
    return Cost(50_000_000, H, 256, start, each)


def test_a_step_takes_what_fits_before_the_first_is_due(engine: Engine) -> None:
    engines = Engines(engine)
    engine.cost = cost_of(100_000.0, 100_000.0)  # 0.1 ms, and 0.1 ms a bin

    def taken(due_ns: int, comes_late: bool = False, waited: int = 0) -> int:
        quota = Quota(engines.cost, 1_000_000_000)
        bin_: Work = late(0, 1) if comes_late else work(0, 1, "plain")
        one = msgspec.structs.replace(bin_, due_ns=due_ns, received_ns=1_000_000_000 - waited)
        return next(k for k in range(1000) if not quota.fits(one))

    assert taken(2**62) == 61  # 6.25 ms, an eighth of the bin
    assert taken(1_002_000_000) == 9  # half of 2 ms
    assert taken(1_002_000_000, waited=12_000_000) == 9
    assert taken(1_002_000_000, waited=13_000_000) == 61  # a backlog: not in ever shorter steps
    assert taken(999_000_000) == 249  # overdue: more at once take less time each
    assert taken(2**62, comes_late=True) == 6  # each a window of bins alone
    assert engine.cost.batch == 61


def test_after_a_stall_the_streams_are_in_time_again(engine: Engine) -> None:
    """64 streams of 50 ms bins, which one by one would take longer than they come, in a time of
    its own: the policy as it is, steps that take exactly what they cost."""
    streams, width, stall_at, stall = 64, 50_000_000, 1_000_000_000, 150_000_000
    engines = Engines(engine)
    policy = Policy(engines.cost)
    engine.cost = cost_of(900_000.0, 400_000.0)
    phases = np.random.default_rng(0).integers(0, width, streams).tolist()
    coming = sorted(
        (phase + i * width, run, i) for run, phase in enumerate(phases) for i in range(80)
    )
    late: list[int] = []
    now, next_ = 0, 0
    while next_ < len(coming) or len(policy):
        while next_ < len(coming) and coming[next_][0] <= now:
            at, run, index = coming[next_]
            one = work(run, index, "plain")
            policy.push(msgspec.structs.replace(one, received_ns=at, due_ns=at + width))
            next_ += 1
        if not len(policy):
            now = coming[next_][0]
            continue
        step = policy.take(engines.batch, now)
        stalled = now < stall_at
        now += round(engine.cost.ns(len(step)))
        if stalled and now >= stall_at:
            now += stall
        late += [one.received_ns for one in step if now > one.due_ns]
    assert min(late) >= stall_at - width
    assert max(late) < stall_at + stall + 10 * width


def test_a_snapshot_goes_on_as_it_was_solved_though_its_time_is_over(engine: Engine) -> None:
    for index in range(H + 2):
        bin_ = msgspec.structs.replace(work(210, index, "plain"), anytime=True)
        (answer,) = engine.solve([bin_])
        assert answer.iterations > 1
    packed = engine.pack(210)
    assert packed is not None
    (expected,) = engine.solve([work(210, H + 2, "plain")])
    late = tuple(msgspec.structs.replace(one, due_ns=1) for one in packed.works)
    engine.forget(210)
    engine.restore(msgspec.structs.replace(packed, works=late))
    (answer,) = engine.solve([work(210, H + 2, "plain")])
    assert held(answer) == held(expected)


def test_after_a_pause_a_run_goes_on_as_if_there_had_been_none(engine: Engine) -> None:
    def solve_at(run: int, index: int, kind: str = "plain", **fields: Any) -> EngineAnswer:
        one = msgspec.structs.replace(work(230, index, kind), run=run, **fields)
        return engine.solve([one])[-1]

    expected = [held(solve_at(230, index)) for index in range(2 * H + 4)]
    for index in range(H + 2):
        solve_at(231, index)
    for index in range(H + 2, 3 * H):
        solve_at(231, index, "missing")
        assert engine.paused(231)
    got = [held(solve_at(231, index, rewind=index == H + 2)) for index in range(H + 2, 2 * H + 4)]
    assert got == expected[H + 2 :]
    assert not engine.paused(231)
    # a bin of the window before the pause can still come
    late = Insert(run=231, index=H + 5, counts=work(230, H + 1, "plain").counts, due_ns=2**62)
    assert not engine.solve([late])[-1].void
    # where the state before it is gone, the estimate begins again, and says so
    for index in range(2 * H + 4, 4 * H):
        solve_at(231, index, "missing")
    engine.adopt(231, engine.window(231))
    assert solve_at(231, 2 * H + 4, rewind=True).restarted
    assert not solve_at(231, 2 * H + 5).restarted


def test_a_snapshot_made_with_another_horizon_gives_its_bins(
    engine: Engine, model_file: Path
) -> None:
    for index in range(H + 4):
        engine.solve([work(220, index, "plain")])
    packed = engine.pack(220)
    assert packed is not None
    longer = Engine.load(model_file, ServiceSettings(device="cpu", horizon=H + 3))
    longer.restore(packed)
    bins = [unpack_work(one) for one in packed.works]
    for k, one in enumerate(bins):
        assert isinstance(one, Solve)
        longer.solve([msgspec.structs.replace(one, run=221, restart=k == 0)])
    (answer,) = longer.solve([work(220, H + 4, "plain")])
    (expected,) = longer.solve([msgspec.structs.replace(work(220, H + 4, "plain"), run=221)])
    assert held(answer) == held(expected)
    assert answer.solver != FAILED
