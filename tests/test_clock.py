"""Clocks of two machines: how far they are apart is known, with its uncertainty, and said.

The other machine is a process that answers by its own clock; a client with a shifted clock is one
whose clock object runs so: the sockets, the service and the probes are the real ones.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from feeder import UNITS, WAIT_S, Feeder, bin_, open_, spikes
from ilqr_clients.load import Generator
from ilqr_clients.load_schedule import Faults, LoadSize
from ilqr_clients.monitor import Monitor, view
from ilqr_clients.sdk import ServiceClient
from ilqr_clients.stream import CROSSING, stream
from ilqr_service.server import Service
from ilqr_vae.protocol import messages
from ilqr_vae.protocol.clock import DRIFT, ClockOffset, ClockTrack, offset_of, this_clock
from process import metrics
from rig import BIN_S, make_model, serving

SECOND = 1_000_000_000

WIRE_IN = 'ilqr_latency_seconds_count{stage="wire_in"}'


@dataclass(frozen=True)
class ShiftedClock:
    """Another machine's clock: ``ahead`` ns of this one's when made, gaining ``drift`` s a second.

    It has no name that this machine knows.
    """

    ahead: int
    drift: float = 0.0
    name: str = "elsewhere"
    made: int = field(default_factory=time.monotonic_ns)

    def now_ns(self) -> int:
        now = time.monotonic_ns()
        return now + self.ahead + round(self.drift * (now - self.made))

    def truth(self, now: int) -> int:
        """The service's clock minus this one when the service's says ``now``."""
        return -self.ahead - round(self.drift * (now - self.made))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    model = make_model(tmp_path_factory.mktemp("model") / "m.safetensors", n_units=7, names=UNITS)
    with serving(model, http="127.0.0.1:0", credits=1000) as running:
        yield running
    assert running.failure is None


# ---- the estimate ------------------------------------------------------------------------------


@given(
    truth=st.integers(-(10**15), 10**15),
    trips=st.lists(
        st.tuples(st.integers(0, 10**8), st.integers(0, 10**8), st.integers(0, 10**9)), min_size=1
    ),
)
def test_the_interval_holds_the_truth_however_unequal_the_ways(
    truth: int, trips: list[tuple[int, int, int]]
) -> None:
    """Each trip: there, back, pause before; nanoseconds."""
    probes: list[tuple[int, int, int]] = []
    now = 0
    for there, back, pause in trips:
        now += pause
        probes.append((now, now + there + truth, now + there + back))
        now += there + back
    found = offset_of(probes)
    assert abs(found.offset_ns - truth) <= found.uncertainty_ns
    assert found.uncertainty_ns <= min(a + b for a, b, _ in trips) // 2 + 2  # as good as the best
    named = offset_of(probes, same=True)
    if named.same:  # believed where no probe speaks against it
        assert abs(truth) <= 2 * found.uncertainty_ns
        assert (named.offset_ns, named.uncertainty_ns, named.uncertainty_at(10**15)) == (0, 0, 0)
    else:
        assert named == found


def test_a_name_is_not_believed_against_the_probes() -> None:
    """Two machines started from one image may name their boots alike."""
    assert not offset_of([(0, SECOND, 1000)], same=True).same
    assert offset_of([(0, 500, 1000)], same=True).same
    assert not offset_of([(0, 500, 1000)]).same


def test_an_offset_grows_old_by_what_clocks_may_part() -> None:
    known = ClockOffset(offset_ns=5, uncertainty_ns=100, at_ns=SECOND)
    assert known.uncertainty_at(SECOND) == 100
    assert known.uncertainty_at(2 * SECOND) == 100 + round(DRIFT * SECOND)


def test_between_two_offsets_lies_the_line() -> None:
    first = ClockOffset(offset_ns=1_000, uncertainty_ns=10, at_ns=0)
    last = ClockOffset(offset_ns=2_000, uncertainty_ns=30, at_ns=10 * SECOND)
    track = ClockTrack(first, last)
    at = np.array([0, 5 * SECOND, 10 * SECOND])
    assert track.offset_ns(at).tolist() == [1_000, 1_500, 2_000]
    assert track.uncertainty_ns == 30
    assert track.to_json()["drift_ppm"] == pytest.approx(0.1)
    assert "± 0.000 ms" in str(track)


# ---- the service and a client ------------------------------------------------------------------


def test_on_one_machine_it_is_said_to_be_the_same_clock(service: Service) -> None:
    if not this_clock():
        pytest.skip("this system does not name its boot")
    with ServiceClient(service.ingest, timeout=WAIT_S) as client:
        clock = client.clock(probes=5)
    assert (clock.same, clock.offset_ns, clock.uncertainty_ns, clock.probes) == (True, 0, 0, 5)


@pytest.mark.parametrize(
    ("ahead", "drift"),
    [(0, 0.0), (3 * SECOND, 0.0), (-7_200 * SECOND, 5e-5), (86_400 * SECOND, -1e-4)],
)
def test_a_client_with_another_clock_knows_how_far_it_is_off(
    service: Service, ahead: int, drift: float
) -> None:
    timer = ShiftedClock(ahead, drift)
    with ServiceClient(service.ingest, timeout=WAIT_S, timer=timer) as client:
        clock = client.clock()
        truth = timer.truth(time.monotonic_ns())
        assert not clock.same
        assert abs(clock.offset_ns - truth) <= clock.uncertainty_at(timer.now_ns())
        assert 0 < clock.uncertainty_ns < SECOND
        with client.open("far", units=UNITS, bin_width=BIN_S, deadline=60.0) as session:
            sent = session.send(0, spikes(1)[0])
            (answer,) = session.receive(WAIT_S)
        arrived_here = time.monotonic_ns()
    assert answer.source_ns == sent
    incoming, outgoing = answer.wire_in_ns(), answer.wire_out_ns(clock)
    assert incoming is not None
    # 10 us: the truth is of the moment it is asked for, and the clock drifts on
    true_in = answer.received_ns - (sent + timer.truth(answer.received_ns))
    assert abs(incoming[0] - true_in) <= incoming[1] + 10_000
    assert outgoing[0] + outgoing[1] >= 0
    assert outgoing[0] - outgoing[1] <= arrived_here - answer.published_ns


def settled(service: Service, name: str, before: dict[str, float], more: float) -> dict[str, float]:
    """Metrics, once one has grown so much: some are counted a moment after the answer is out."""
    end = time.monotonic() + WAIT_S
    while True:
        now = metrics(service)
        if now[name] >= before.get(name, 0.0) + more or time.monotonic() > end:
            return now


def test_the_services_own_metric_is_corrected_and_says_how_far_off_it_may_be(
    service: Service,
) -> None:
    before = metrics(service)
    with (
        ServiceClient(service.ingest, timeout=WAIT_S, timer=ShiftedClock(-50 * SECOND)) as client,
        client.open("m", units=UNITS, bin_width=BIN_S, deadline=60.0) as session,
    ):
        log = stream(session, spikes(20))
    assert log.answered == 20
    after = settled(service, WIRE_IN, before, 20)
    grown = {k: after[k] - before.get(k, 0.0) for k in after}
    assert grown[WIRE_IN] == 20
    assert grown[WIRE_IN.replace("count", "sum")] < 20.0  # not twenty times fifty seconds
    assert grown["ilqr_wire_in_uncertainty_seconds_count"] == 20
    assert 0 < grown["ilqr_wire_in_uncertainty_seconds_sum"] < 20.0
    with Feeder(service.ingest, service.results) as feeder:  # one that says nothing of its clock
        feeder.subscribe("mute")
        feeder.ask(open_("mute"), messages.Opened)
        feeder.send(bin_("mute", 0, spikes(1)[0]))
        feeder.results(1)
        feeder.ask(messages.Close(session="mute"), messages.Closed)
    last = settled(service, "ilqr_unclocked_total", after, 1)
    assert last["ilqr_unclocked_total"] == after["ilqr_unclocked_total"] + 1
    assert last[WIRE_IN] == after[WIRE_IN]


def test_a_replay_across_machines_gives_each_way_with_its_uncertainty(service: Service) -> None:
    timer = ShiftedClock(900 * SECOND, drift=8e-5)
    with ServiceClient(service.ingest, timeout=WAIT_S, timer=timer) as client:
        before = client.clock()
        with client.open("two", units=UNITS, bin_width=BIN_S, deadline=60.0) as session:
            log = stream(session, spikes(60), interval=0.01)
        track = ClockTrack(before, client.clock())
    assert not track.same
    assert track.drift == pytest.approx(-8e-5, abs=2 * track.uncertainty_ns / (0.5 * SECOND))
    ways = log.latency_ms(slice(None), track)
    # what the service's clock, which is this machine's, showed when the bin was sent, when it came
    true_sent = timer.made + np.rint((log.sent - timer.made - timer.ahead) / (1 + 8e-5))
    true_arrived = timer.made + np.rint((log.arrived - timer.made - timer.ahead) / (1 + 8e-5))
    bound = track.uncertainty_ns / 1e6 + 0.001
    np.testing.assert_allclose(ways["wire_in"], (log.received - true_sent) / 1e6, 0, bound)
    np.testing.assert_allclose(ways["wire_out"], (true_arrived - log.published) / 1e6, 0, bound)
    np.testing.assert_allclose(ways["wire_in"] + ways["wire_out"], ways["wire"], 0, 0.1)
    one_clock = log.latency_ms(slice(None))
    assert set(ways) - set(one_clock) == set(CROSSING)
    for stage, values in one_clock.items():  # no offset enters the others
        np.testing.assert_array_equal(values, ways[stage])


def test_a_load_says_how_the_clocks_were_compared(service: Service) -> None:
    for timer, same in ((ShiftedClock(-40 * SECOND), False), (None, bool(this_clock()))):
        load = LoadSize(sessions=2, bins=20, speed=10.0, deadline=60.0, patience=20.0)
        with Generator(service.ingest, load, Faults(), prefix=f"c{same}", timer=timer) as generator:
            generator.open()
            told = generator.run().to_json()
        assert told["answered"] == told["latency_ms"]["n"] == told["wire_in_ms"]["n"] == 40
        assert told["clock"]["same"] == same
        for way in ("wire_in_ms", "wire_out_ms"):
            bound = told[way]["clock_uncertainty"]
            assert (bound == 0) == same
            assert -bound <= told[way]["p50"] <= told["latency_ms"]["max"] + bound


def test_the_monitor_gives_both_ways_of_the_newest_answer(service: Service) -> None:
    timer = ShiftedClock(7 * SECOND)
    with (
        ServiceClient(service.ingest, timeout=WAIT_S, timer=timer) as client,
        Monitor(service.ingest, timeout=WAIT_S, timer=ShiftedClock(-9 * SECOND)) as monitor,
        client.open("seen", units=UNITS, bin_width=BIN_S, deadline=60.0) as session,
    ):
        monitor.snapshot()
        index, shown = 0, None
        end = time.monotonic() + WAIT_S
        while shown is None and time.monotonic() < end:
            session.send(index, spikes(1)[0])
            index += 1
            session.receive(0.1)
            monitor.listen(0.1)
            told = monitor.snapshot().to_json()["sessions"]
            shown = next(s["newest"] for s in told if s["session"] == "seen")
        assert shown is not None
        for way in ("wire_in", "wire_out"):
            assert 0 < shown[way]["uncertainty_ms"] < 1e3
            assert -shown[way]["uncertainty_ms"] <= shown[way]["ms"] < 5e3  # neither 7 s nor 9 s
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(view(monitor.snapshot()))
        text = console.export_text()
        assert "clocks: service +" in text
        assert "newest answer  in " in text
        assert "±" in text


def test_an_old_offset_is_probed_anew_while_bins_are_sent(service: Service) -> None:
    """A clock that is eleven seconds on at each bin, as far as this client can tell."""

    class Leaping(ShiftedClock):
        def now_ns(self) -> int:
            return super().now_ns() + leaps * 11 * SECOND

    leaps = 0
    with (
        ServiceClient(service.ingest, timeout=WAIT_S, timer=Leaping(0)) as client,
        client.open("leap", units=UNITS, bin_width=BIN_S, deadline=60.0) as session,
    ):
        first = session.clock.offset
        assert first is not None
        end = time.monotonic() + WAIT_S
        while session.clock.offset is first and time.monotonic() < end:
            leaps += 1  # each is a probe, and a better one the older the first has become
            session.send(leaps - 1, spikes(1)[0])
            for _ in range(10):
                session.receive(0.02)
        newer = session.clock.offset
    assert newer is not None
    assert newer is not first
    assert abs(newer.offset_ns + leaps * 11 * SECOND) <= newer.uncertainty_ns


def test_source_times_rise_with_the_index(service: Service) -> None:
    with Feeder(service.ingest, service.results) as feeder:
        feeder.subscribe("time")
        feeder.ask(open_("time"), messages.Opened)
        row = spikes(1)[0]

        def at(index: int, source_ns: int) -> messages.Bin:
            whole = messages.pack(row, "<u2")
            return messages.Bin(session="time", index=index, source_ns=source_ns, counts=whole)

        feeder.send(at(0, 100), at(1, 100), at(4, 400))
        assert [r.index for r in feeder.results(5)] == list(range(5))
        for bad in (at(5, 399), at(2, 401)):  # a later bin before, an earlier one after
            refused = feeder.ask(bad, messages.Refused)
            assert refused.field == "source_ns"
            assert "bin 4's 400" in refused.expected
        feeder.send(at(5, 500), at(2, 200))
        assert {r.index for r in feeder.results(5)} == {2, 3, 4, 5}
        feeder.ask(messages.Close(session="time"), messages.Closed)
    assert service.telemetry.counts()["refused:source_ns"] == 2
