"""The benchmark command: a row for what is not there, and a page made of files alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.adapt import ratio
from benchmarks.lqr import problem_of
from benchmarks.models import BIN_S, decoder_of, estimator_of
from benchmarks.queueing import Core, Interruption, Sends, Simulation, interruptions
from benchmarks.rivals import socu_lqr
from benchmarks.stream import measure, time_parts

from ilqr_clients.load import Generator, Stamps
from ilqr_clients.load_schedule import Faults, LoadSize, schedule
from ilqr_vae.lqr import solve_lqr

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there to be measured")
def test_without_a_gpu_a_row_says_so_and_the_page_shows_it(tmp_path: Path) -> None:
    file, page = tmp_path / "gpu.json", tmp_path / "performance.md"
    ran = run("gpu", "--quick", "--json", str(file))
    assert ran.returncode == 0, ran.stderr
    content = json.loads(file.read_text())
    assert content["quick"] is True
    assert {"processor", "cores", "commit", "versions", "load_at_start"} <= set(content["machine"])
    assert [r["not_measured"] for r in content["rows"]] == ["no CUDA device"]
    ran = run("table", str(file), "--page", str(page))
    assert ran.returncode == 0, ran.stderr
    text = page.read_text()
    assert "no CUDA device" in text
    assert text.count("Not measured.") == 4  # the benchmarks whose files are not given


def test_an_unknown_benchmark_is_refused() -> None:
    ran = run("abacus", "--json", "x.json")
    assert ran.returncode == 2
    assert "abacus" in ran.stderr


def test_a_streams_step_is_timed_in_parts_and_several_members_as_one() -> None:
    sizes = (4, 2, 5, 3, 2)
    assert len(measure(decoder_of(2, *sizes), 1, 0.0)) == 20
    parts = time_parts(estimator_of(*sizes), 0.0, seconds=0.0)
    assert all(parts[name] > 0 for name in ("enter", "solve", "leave"))


def test_the_load_generator_sends_each_bin_at_its_time_and_matches_its_answer() -> None:
    every = 20_000_000
    load = LoadSize(sessions=3, bins=12, warm_up=4)
    command = [sys.executable, "-m", "benchmarks.echo", "2", "5", str(every / 1e9)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as echo:
        try:
            assert echo.stdout is not None
            with Generator(json.loads(echo.stdout.readline())["ingest"], load, Faults()) as made:
                made.open()
                outcome = made.run()
        finally:
            echo.kill()
    assert (outcome.first_statuses, outcome.unanswered) == ({"ok": 36}, 0)
    assert len(outcome.stamps) == 3 * 8
    times = np.array(outcome.stamps).T
    assert (np.diff(times, axis=0) >= 0).all()
    phases = np.unique(times[0] % every)
    assert len(phases) == 3  # each begins at a time of its own, and keeps to it
    for phase in phases:
        assert (np.diff(np.sort(times[0][times[0] % every == phase])) == every).all()
    assert outcome.to_json()["latency_ms"]["n"] == 24


def stamped(streams: int, bins: int = 40) -> list[Stamps]:
    """What a server would state that takes all bins that wait: 0.1 ms to read one, 0.2 ms for a
    step and 0.3 ms for each of its bins, 0.05 ms to publish each."""
    load = LoadSize(sessions=streams, bins=bins)
    sends = np.array([at for at, _, _ in schedule(load, Faults(), BIN_S)]) / 1e9
    stamps, first, now = list[Stamps](), 0, 0.0
    read = sends + 1e-4
    while first < sends.size:
        begin = max(now, read[first]) + 1e-4
        last = int(np.searchsorted(read, begin, side="right"))
        end = begin + 2e-4 + 3e-4 * (last - first)
        arrived = int(np.searchsorted(read, end)) - last
        end += 1e-4 * arrived
        now = end + 5e-5 * (last - first)
        for i in range(first, last):
            told = end + 5e-5 * (i - first + 1)
            times = (sends[i], sends[i], read[i], begin, end, told, told + 2e-4)
            stamps.append(Stamps(*(round(t * 1e9) for t in times)))
        first = last
    return stamps


def test_the_queueing_model_predicts_a_load_from_others() -> None:
    core = Core.fitted([stamped(8), stamped(30)])
    assert core.times.solve + core.times.each == pytest.approx(5e-4, rel=0.2)
    assert 60 < core.most_streams(BIN_S) < 150
    stamps = stamped(55)
    sends = Sends.of(stamps)
    percentiles = (50, 90, 99)
    measured = np.percentile(sends.measured, percentiles)
    model = np.percentile(Simulation(core, BIN_S).run(sends), percentiles)
    assert model == pytest.approx(measured, rel=0.3)
    assert not interruptions(core, stamps)
    stalled = [s._replace(solve_end=s.solve_end + 10**7) for s in stamps[:1]]
    (taken,) = interruptions(
        core, [*stalled, *(s for s in stamps if s.solve_start != stamps[0][3])]
    )
    assert taken.seconds == pytest.approx(0.01, rel=0.2)
    slowed = Simulation(core, BIN_S, [Interruption(1.0, 0.2)]).run(sends)
    assert slowed.max() > 0.2 > sends.measured.max()


def test_the_ratio_of_two_tails_is_of_all_blocks_and_has_an_interval() -> None:
    ms = np.random.default_rng(1).lognormal(size=(8, 500))
    found = ratio([(block, 1.2 * block) for block in ms])
    assert found["ratio"] == found["interval"][0] == found["interval"][1] == 1.2
    assert found["p99_us"] == round(1e3 * float(np.percentile(ms, 99)), 1)


def test_the_multipliers_that_socu_solves_for_give_the_states() -> None:
    problem = problem_of(1, 3, 2, 4)
    A, B, Q, q, R, r = (x[0].numpy() for x in problem.tensors().values())
    D, E, b = socu_lqr.system(A, B, Q, q, R, r)
    dense = np.zeros((12, 12))
    for t in range(4):
        dense[3 * t : 3 * t + 3, 3 * t : 3 * t + 3] = D[t]
        if t:
            dense[3 * t : 3 * t + 3, 3 * t - 3 : 3 * t] = E[t - 1]
            dense[3 * t - 3 : 3 * t, 3 * t : 3 * t + 3] = E[t - 1].T
    y = np.linalg.solve(dense, b.ravel()).reshape(4, 3)
    found = solve_lqr(problem, free_initial=True).dz[0].numpy()
    np.testing.assert_allclose(socu_lqr.states(A, Q, q, y), found, atol=1e-12)
