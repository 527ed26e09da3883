"""What goes wrong on purpose, and who decodes it: disturbances, a steered replay, rivals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from feeder import WAIT_S
from ilqr_clients.connection import connect
from ilqr_clients.sdk import ServiceClient
from ilqr_clients.steering import Remote
from ilqr_service.server import Service
from ilqr_training.evaluation.baselines import GRU, KALMAN, fit_baselines, fit_rivals
from ilqr_training.evaluation.gru import GRUConfig, GRUDecoder
from ilqr_vae.cli import main
from ilqr_vae.errors import ConfigError
from ilqr_vae.files import read_toml
from ilqr_vae.protocol import messages
from ilqr_vae.recordings import load_recording
from ilqr_vae.scoring.online import OnlineGRU, Rivals
from ilqr_vae.simulated.disturbance import Change, Course, Disturbance, Disturber, Script
from rig import BIN_S, N_BINS, SPLIT, make_model, serving, spec, until, write_recording

N_UNITS = 8
SHARES = st.sampled_from((0.0, 0.25, 0.5, 1.0))
DISTURBANCES = st.builds(
    Disturbance,
    silent=SHARES,
    swapped=SHARES,
    dropped=st.sampled_from((0.0, 0.3, 0.9)),
    gain=st.sampled_from((0.0, 0.5)),
    baseline=st.sampled_from((0.0, 5.0)),
    noise=st.sampled_from((0.0, 2.0)),
)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.lists(DISTURBANCES, min_size=2, max_size=12), st.data())
def test_a_batch_is_its_bins_in_any_order(
    seed: int, what: list[Disturbance], data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(3.0, (len(what), N_UNITS)).astype(np.uint16)
    mask = rng.random(counts.shape) < 0.8
    before = counts.copy(), mask.copy()
    whole, seen, came = Disturber(N_UNITS, BIN_S, seed).batch(counts, mask, what, first=5)
    other = Disturber(N_UNITS, BIN_S, seed)
    for t in data.draw(st.permutations(range(len(what)))):
        one = other.bin(5 + t, counts[t], mask[t], what[t])
        assert (one is not None) == came[t]
        if one is not None:
            np.testing.assert_array_equal(one[0], whole[t])
            np.testing.assert_array_equal(one[1], seen[t])
    cut = data.draw(st.integers(1, len(what) - 1))
    late = other.batch(counts[cut:], mask[cut:], what[cut:], first=5 + cut)
    np.testing.assert_array_equal(late[0], whole[cut:])
    np.testing.assert_array_equal(before, (counts, mask))  # what was given stays


def test_each_disturbance_does_what_it_says() -> None:
    units, bins = 40, 2000
    counts = np.full((bins, units), 4, dtype=np.uint16)
    disturber = Disturber(units, BIN_S, 1)

    def made(**what: float) -> tuple[np.ndarray, np.ndarray]:
        out, _, came = disturber.batch(counts, None, [Disturbance(**what)] * bins)
        return out.astype(float), came

    np.testing.assert_array_equal(made()[0], counts)
    quarter, half = (made(silent=share)[0][0] == 0 for share in (0.25, 0.5))
    assert (quarter.sum(), half.sum()) == (10, 20)
    assert (half | ~quarter).all()  # more silent units are the same and others
    assert made(dropped=0.3)[1].mean() == pytest.approx(0.7, abs=0.05)
    assert made(noise=10.0)[0].mean() == pytest.approx(4 + 10 * BIN_S, abs=0.05)
    gain = np.log(made(gain=0.4)[0].mean(0) / 4)
    assert gain.std() == pytest.approx(0.4, rel=0.4)
    shift = (made(baseline=10.0)[0].mean(0) - 4) / BIN_S
    assert shift.std() == pytest.approx(10, rel=0.4)
    named = np.tile(np.arange(units, dtype=np.uint16), (1, 1))
    swapped, _, _ = disturber.batch(named, None, [Disturbance(swapped=0.5)])
    moved = np.flatnonzero(swapped[0] != named[0])
    assert len(moved) == 20
    np.testing.assert_array_equal(swapped[0][swapped[0][moved]], moved)  # in pairs


def test_a_course_follows_its_script(tmp_path: Path) -> None:
    path = tmp_path / "script.toml"
    path.write_text(
        "[[change]]\nat = 10\nover = 4\nsilent = 0.5\n"
        "[[change]]\nat = 12\nlatency = 0.1\n[[change]]\nat = 20\nsilent = 0\nseek = 3\n"
    )
    course = Course(read_toml(path, Script, "--script").change)
    assert course.until(9.9) == []
    assert course.at(9.9) == Disturbance()
    assert len(course.until(12.0)) == 2
    assert course.at(12.0) == Disturbance(silent=0.25, latency=0.1)
    assert course.at(15.0) == Disturbance(silent=0.5, latency=0.1)
    course.add(Change(at=16.0, gain=0.2, over=2.0))
    course.until(17.0)
    assert course.at(17.0) == Disturbance(silent=0.5, latency=0.1, gain=0.1)
    assert course.until(30.0)[0].seek == 3
    assert course.at(30.0) == Disturbance(latency=0.1, gain=0.2)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[[change]]\nsilent = 1.5\n", "change.silent: expected"),
        ("[[change]]\nat = nan\n", "change.at: expected"),
        ("[[change]]\nsilnt = 0.5\n", "change.silnt: expected one of the keys"),
        ("change = 3\n", "change: expected"),
    ],
)
def test_a_wrong_script_is_refused(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "script.toml"
    path.write_text(content)
    with pytest.raises(ConfigError, match="expected") as refused:
        read_toml(path, Script, "--script")
    assert said in str(refused.value)


def test_rivals_decode_bin_by_bin_as_they_do_offline(tmp_path: Path) -> None:
    recording = load_recording(write_recording(tmp_path / "r.mat", n_units=N_UNITS), spec())
    fitted = fit_rivals(recording, SPLIT, steps=20)
    path = tmp_path / "rivals.npz"
    fitted.save(path)
    decoders = Rivals.load(path).decoders()
    bins = (0, N_BINS)
    missing = np.zeros((N_BINS, N_UNITS), dtype=bool)
    missing[[60, 61, 200]] = True
    kalman = fit_baselines(recording, SPLIT, (KALMAN,))[KALMAN].decode(bins, missing=missing)
    given = [None if missing[t].all() else recording.counts[t] for t in range(N_BINS)]
    np.testing.assert_allclose(
        [decoders[KALMAN].step(one) for one in given], kalman, rtol=0, atol=1e-9
    )
    net = GRUDecoder.fit(recording, SPLIT, grid=(GRUConfig(hidden=16, steps=10, schedule=10),))
    zeros = np.where(missing, 0, recording.counts).astype(np.float64)
    ours = OnlineGRU(net.weights())
    np.testing.assert_allclose(
        [ours.step(one) for one in given], net.decode(recording, zeros, bins), rtol=0, atol=1e-5
    )
    assert np.isfinite([decoders[GRU].step(one) for one in given]).all()
    with pytest.raises(ConfigError, match="rivals: units"):
        fitted.require(("other",), ("vx", "vy"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ConfigError, match="--rivals: expected a file"):
        Rivals.load(path)


def test_disturbances_are_plain_data() -> None:
    assert set(Disturbance.__struct_fields__) <= set(Change.__struct_fields__)
    assert msgspec.json.decode(b"{}", type=Disturbance) == Disturbance()


UNITS = tuple(f"unit{i}" for i in range(N_UNITS))


@dataclass(frozen=True)
class Rig:
    service: Service
    recording: Path
    rivals: Path

    def replay(self, *options: str | Path) -> int:
        to = ("--to", self.service.ingest, "--rivals", str(self.rivals))
        return main(["replay", str(self.recording), *to, *map(str, options)])


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("rig")
    model = make_model(folder / "m.safetensors", n_units=N_UNITS)
    recording = write_recording(folder / "reach.mat", n_units=N_UNITS)
    fit_rivals(load_recording(recording, spec()), SPLIT, steps=5).save(folder / "rivals.npz")
    with serving(model, credits=1000) as service:
        yield Rig(service, recording, folder / "rivals.npz")


def test_a_scripted_replay_is_the_same_twice_and_reports_what_it_did(
    rig: Rig, tmp_path: Path
) -> None:
    script = tmp_path / "script.toml"
    script.write_text(
        "[[change]]\nat = 6\nsilent = 0.5\ndropped = 0.2\n"
        "[[change]]\nat = 7\nseek = 5.5\nsilent = 0\n"
        "[[change]]\nat = 8\ndropped = 0\ngain = 0.3\n"
    )
    numbers = tmp_path / "r.json"
    runs = [tmp_path / "a.npz", tmp_path / "b.npz"]
    for path, speed in zip(runs, ("max", "20"), strict=True):
        options = ("--script", script, "--speed", speed, "--deadline-ms", "60000", "--seed", "2")
        assert rig.replay(*options, "--arrays", path, "--json", numbers) == 0
    with np.load(runs[0]) as a, np.load(runs[1]) as b:
        for name in a.files:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
        missing = a["status"] == "missing"
    assert missing[20:60].any()  # after 100 bins of warm-up
    assert not missing[:20].any()
    assert not missing[60:].any()
    assert len(missing) == 120 + 30  # 1.5 s of it twice
    report = json.loads(numbers.read_text())
    assert set(report["scores"]) == {"iLQR-VAE", "Wiener filter", KALMAN, GRU}
    assert [change["at"] for change in report["changes"]] == [6, 7, 8]
    assert any("Changed on purpose: at 6" in note for note in report["notes"])


def test_a_replay_is_steered_over_its_socket(rig: Rig, tmp_path: Path) -> None:
    numbers, done = tmp_path / "r.json", list[int]()
    options = ("--speed", "4", "--loop", "--steer", "tcp://127.0.0.1:*", "--session", "live")
    with (
        ServiceClient(rig.service.ingest, timeout=WAIT_S) as client,
        client.listen("live", wait=True) as results,
    ):
        run = Thread(target=lambda: done.append(rig.replay(*options, "--json", numbers)))
        run.start()
        where = steering_of(rig.service, "live")
        with Remote(where["address"], where["secret"], timeout=WAIT_S) as remote:
            assert remote.state()["decoders"] == ["iLQR-VAE", KALMAN, GRU]
            with pytest.raises(ConfigError, match="silent: expected"):
                remote.change(silent=2)
            with pytest.raises(ConfigError, match=r"change\.decoder: expected"):
                remote.change(decoder=GRU)
            stranger = Remote(where["address"], "wrong", timeout=WAIT_S)
            with stranger, pytest.raises(ConfigError, match="secret"):
                stranger.change(paused=True)
            remote.change(paused=True, dropped=0.9)
            until("paused", lambda: remote.state()["paused"])
            while results.receive(0.3):
                pass  # what was under way
            newest = results.newest
            assert newest is not None
            assert not results.receive(0.3)
            remote.change(paused=False, loop=False, seek=1e4)  # to its last bin
        run.join(WAIT_S)
    assert done == [0]
    assert json.loads(numbers.read_text())["changes"][-1]["loop"] is False


def steering_of(service: Service, session: str) -> dict[str, Any]:
    """The newest ``steering`` event of a session, which comes once it is open."""
    context: zmq.Context[Any] = zmq.Context()
    socket = connect(context, zmq.SUB, service.results)
    socket.setsockopt(zmq.SUBSCRIBE, messages.event_topic(session))
    try:
        while True:
            assert socket.poll(1000 * int(WAIT_S))
            event = messages.decode_published(socket.recv_multipart()[-1])
            if isinstance(event, messages.Event) and event.name == "steering":
                return event.payload
    finally:
        context.destroy(linger=0)


def test_a_rival_steers_the_closed_loop(rig: Rig, tmp_path: Path) -> None:
    names = tuple(f"unit{i:03d}" for i in range(N_UNITS))
    model = make_model(tmp_path / "m.safetensors", n_units=N_UNITS, names=names)
    rivals, script, numbers = (tmp_path / name for name in ("r.npz", "s.toml", "n.json"))
    replace(Rivals.load(rig.rivals), unit_names=names).save(rivals)
    script.write_text("[[change]]\nat = 0.2\nsilent = 0.5\ndropped = 0.3\nlatency = 0.1\n")
    with serving(model) as service:

        def run(*options: str) -> int:
            files = ("--rivals", str(rivals), "--json", str(numbers), "--script", str(script))
            sizes = ("--units", str(N_UNITS), "--trials", "1", "--speed", "max")
            return main(["closed-loop", "--to", service.ingest, *sizes, *files, *options])

        assert run() == 0
        ours = json.loads(numbers.read_text())
        assert run("--decoder", KALMAN) == 0
        other = json.loads(numbers.read_text())
        assert run("--decoder", "nobody") == 2
        script.write_text("[[change]]\nseek = 1\n")
        assert run() == 2
    assert (ours["steered_by"], other["steered_by"]) == ("iLQR-VAE", KALMAN)
    assert ours["statuses"]["missing"] > 0
    assert [change["at"] for change in other["changes"]] == [0, 0.2]
