"""The service over real sockets on loopback, with a real (tiny, untrained) model."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import zmq
from numpy.typing import NDArray

from feeder import UNITS, Feeder, bin_, numbers, open_, spikes
from ilqr_service.server import Service
from ilqr_service.settings import ServiceSettings
from ilqr_service.solving.engine import Engine
from ilqr_service.work import FAILED, Solve
from ilqr_vae.errors import ConfigError
from ilqr_vae.kernels.backend import device_of
from ilqr_vae.protocol import messages
from process import offline

# ---- answers -----------------------------------------------------------------------------------


def test_what_is_streamed_is_what_the_estimator_says_at_any_speed(
    service: Service, feeder: Feeder, model_file: Path
) -> None:
    counts, lost = spikes(30), {0, 7, 8, 19}
    observed = np.ones(counts.shape, dtype=bool)
    observed[list(lost)] = False
    observed[12, :3] = False
    sent = [i for i in range(30) if i not in lost]

    def bin_of(session: str, i: int) -> messages.Bin:
        mask = None if observed[i].all() else messages.pack(observed[i], "u1")
        return bin_(session, i, counts[i], mask=mask)

    feeder.subscribe("fast")
    assert feeder.ask(open_("fast"), messages.Opened).kinematic_names == ("vx", "vy")
    feeder.send(*(bin_of("fast", i) for i in sent))
    fast = feeder.results(30)
    assert [r.index for r in fast] == list(range(30))
    assert {r.index for r in fast if r.status == "missing"} == lost
    assert {r.status for r in fast if r.index not in lost} == {"ok"}
    for result, expected in zip(fast, offline(model_file, counts, observed), strict=True):
        np.testing.assert_allclose(numbers(result), expected, rtol=0, atol=1e-12)
    for r in fast:
        stages = [r.source_ns, r.received_ns, r.solve_start_ns, r.solve_end_ns, r.published_ns]
        assert stages == sorted(stages)

    feeder.subscribe("slow")
    feeder.ask(open_("slow"), messages.Opened)
    slow: list[messages.Result] = []
    for i in sent:  # one at a time, each after the answer to the one before
        feeder.send(bin_of("slow", i))
        while not slow or slow[-1].index != i:
            slow += feeder.results(1)
    for a, b in zip(fast, slow, strict=True):
        np.testing.assert_array_equal(numbers(a), numbers(b))


def test_sessions_side_by_side_equal_each_alone(feeder: Feeder, model_file: Path) -> None:
    streams = {f"side{k}": spikes(12, seed=k) for k in range(3)}
    for name in streams:
        feeder.subscribe(name)
        feeder.send(open_(name))
    feeder.send(*(bin_(name, i, x[i]) for i in range(12) for name, x in streams.items()))
    got: dict[str, list[messages.Result]] = {name: [] for name in streams}
    for r in feeder.results(36):
        got[r.session].append(r)
    everything = np.ones((12, len(UNITS)), dtype=bool)
    for name, x in streams.items():
        for result, expected in zip(got[name], offline(model_file, x, everything), strict=True):
            np.testing.assert_allclose(numbers(result), expected, rtol=0, atol=1e-12)
    infos = {i.session: i for i in feeder.ask(messages.Sessions(), messages.SessionList).sessions}
    assert infos["side1"].bins == infos["side1"].statuses["ok"] == 12
    assert infos["side1"].solve_p99_ns >= infos["side1"].solve_p50_ns > 0


def test_credits_come_back(feeder: Feeder) -> None:
    assert feeder.ask(open_("credits"), messages.Opened).credits == 200
    feeder.send(*(bin_("credits", i, spikes(1)[0]) for i in (0, 1, 2, 5)))
    returned, newest = 0, -1
    while returned < 4:
        credit = feeder.reply_of(messages.Credit)
        returned, newest = returned + credit.credits, credit.index
    assert (returned, newest) == (4, 5)
    assert feeder.ask(messages.Close(session="credits"), messages.Closed).bins == 6


def test_anytime_stops_at_the_deadline_and_says_so(feeder: Feeder) -> None:
    feeder.subscribe("anytime")
    feeder.ask(open_("anytime", deadline_ns=1, anytime=True), messages.Opened)
    for i, x in enumerate(spikes(5)):
        feeder.send(bin_("anytime", i, x))
        (r,) = feeder.results(1)
        assert (r.iterations, r.status) == (1, "late")
    # what is overdue while newer bins wait is not solved, and says so
    feeder.send(*(bin_("anytime", i, x) for i, x in enumerate(spikes(40), start=5)))
    burst = feeder.results(40)
    assert {(r.iterations, r.status, r.solver == "shed") for r in burst} <= {
        (1, "late", False),
        (0, "extrapolated", True),
    }
    assert burst[-1].iterations == 1
    assert any(r.solver == "shed" for r in burst)
    feeder.subscribe("fixed")
    feeder.ask(open_("fixed", deadline_ns=1), messages.Opened)
    feeder.send(bin_("fixed", 0, spikes(1)[0]))
    (r,) = feeder.results(1)
    assert (r.iterations, r.status) == (2, "late")  # the clock touches flags, never numbers


def test_a_solve_that_raises_is_answered_and_the_run_goes_on(model_file: Path) -> None:
    engine = Engine.load(model_file, ServiceSettings(device="cpu"))

    def work(index: int, counts: NDArray[np.float64]) -> Solve:
        return Solve(run=5, index=index, counts=counts, restart=index == 0, due_ns=2**62)

    first, broken, after = (engine.solve([work(i, np.ones(n))])[0] for i, n in enumerate((7, 9, 7)))
    assert broken.solver == FAILED
    assert broken.spikes == 0
    for a in (first, broken, after):
        assert np.isfinite(a.latent).all()
    (lost,) = engine.solve([Solve(run=6, index=0, counts=np.ones(9), restart=True, due_ns=2**62)])
    assert lost.solver == FAILED
    assert len(engine) == 2
    engine.forget(5)
    engine.forget(6)
    assert len(engine) == 0


def test_device_is_checked() -> None:
    assert device_of("auto").type in {"cpu", "cuda"}
    for name in ("tpu", "mps", "cuda:99", "cpu:x"):
        with pytest.raises(ConfigError, match="device"):
            device_of(name)


# ---- who may feed ------------------------------------------------------------------------------


def test_another_feeder_needs_a_higher_epoch(service: Service, feeder: Feeder) -> None:
    feeder.subscribe("mine")
    feeder.ask(open_("mine"), messages.Opened)
    with Feeder(service.ingest, service.results) as thief:
        assert thief.ask(open_("mine"), messages.Refused).field == "epoch"
        assert thief.ask(bin_("mine", 0, spikes(1)[0]), messages.Refused).field == "session"
        feeder.send(bin_("mine", 0, spikes(1)[0]))
        assert feeder.results(1)[0].status == "ok"
        thief.ask(open_("mine", epoch=1), messages.Opened)
        assert feeder.notice("restarted").epoch == 0
        assert feeder.reply_of(messages.Closed).bins == 1
        assert feeder.ask(bin_("mine", 1, spikes(1)[0]), messages.Refused).field == "session"
        thief.send(bin_("mine", 0, spikes(1)[0], epoch=1))
        (r,) = feeder.results(1)
        assert (r.epoch, r.index) == (1, 0)


def test_a_new_subscriber_alone_gets_the_last_value(service: Service, feeder: Feeder) -> None:
    assert feeder.subscribe("last") == messages.Notice(session="last", epoch=0, what="subscribed")
    feeder.ask(open_("last"), messages.Opened)
    feeder.send(bin_("last", 0, spikes(1)[0]))
    (before,) = feeder.results(1)
    for _ in range(3):
        with Feeder(service.ingest, service.results) as late:
            assert late.subscribe("last") == before
    # "last" is no prefix of "last1"
    feeder.send(open_("last1"), bin_("last1", 0, spikes(1)[0]), bin_("last", 1, spikes(1)[0]))
    (after,) = feeder.results(1)
    assert (after.session, after.index) == ("last", 1)


def test_subscribers_that_come_and_go_cost_the_others_nothing(
    service: Service, feeder: Feeder
) -> None:
    feeder.subscribe("churn")
    feeder.ask(open_("churn"), messages.Opened)
    counts, got = spikes(60), set[int]()
    for i, x in enumerate(counts):
        with Feeder(service.ingest, service.results) as passing:
            for topic in (messages.topic("churn"), b"", b"c"):
                passing.sub.setsockopt(zmq.SUBSCRIBE, topic)
            if i % 3 == 0:
                passing.published()
            if i % 2 == 0:
                passing.sub.setsockopt(zmq.UNSUBSCRIBE, b"")
            feeder.send(bin_("churn", i, x))
    while len(got) < len(counts):  # the last message may come twice, none may be lost
        got.add(feeder.results(1)[0].index)
    assert got == set(range(60))


def test_describe_and_probe(service: Service, feeder: Feeder) -> None:
    described = feeder.ask(messages.Describe(), messages.Described)
    assert described.ready
    assert (described.protocol, described.results) == (messages.PROTOCOL, service.results)
    assert tuple(described.manifest["unit_names"]) == UNITS
    before = time.monotonic_ns()
    probed = feeder.ask(messages.Probe(client_ns=before), messages.Probed)
    assert probed.client_ns == before <= probed.service_ns <= time.monotonic_ns()
