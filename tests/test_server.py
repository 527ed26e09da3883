"""The service over real sockets on loopback, with a real (tiny, untrained) model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zmq
from feeder import WAIT_S, Feeder, numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from ilqr_service.engine import Engine, choose_device
from ilqr_service.server import Service
from ilqr_service.settings import ServiceSettings
from ilqr_service.web import Web
from ilqr_service.work import FAILED, Work
from ilqr_vae.artifact import load_artifact
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from ilqr_vae import wire
from ilqr_vae.cli import main
from ilqr_vae.errors import ConfigError, ServiceError

UNITS = tuple(f"u{i}" for i in range(7))
BIN_NS = 50_000_000
GENEROUS_NS = 60_000_000_000
FREE = {"ingest": "tcp://127.0.0.1:*", "results": "tcp://127.0.0.1:0", "http": "127.0.0.1:0"}


@pytest.fixture(scope="module")
def service(model_file: Path) -> Iterator[Service]:
    options = ServiceSettings(**FREE, device="cpu", credits=200, gap_limit=20)
    running = Service(Engine.load(model_file, options), options)
    running.start()
    assert running.wait_ready(60)
    yield running
    running.stop()
    assert running.failure is None


@pytest.fixture
def feeder(service: Service) -> Iterator[Feeder]:
    with Feeder(service.ingest, service.results) as f:
        yield f


def open_(session: str, **changes: Any) -> wire.Open:
    fields: dict[str, Any] = {
        "protocol": wire.PROTOCOL,
        "session": session,
        "units": UNITS,
        "bin_width_ns": BIN_NS,
        "deadline_ns": GENEROUS_NS,
    }
    return wire.Open(**(fields | changes))


def bin_(session: str, index: int, counts: NDArray[Any], **changes: Any) -> wire.Bin:
    return wire.Bin(
        session=session,
        index=index,
        source_ns=time.monotonic_ns(),
        counts=wire.pack(counts, "<u2"),
        **changes,
    )


def spikes(n_bins: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).poisson(1.0, (n_bins, len(UNITS)))


def offline(
    path: Path, counts: NDArray[Any], observed: NDArray[np.bool_]
) -> list[NDArray[np.float64]]:
    """The same bins straight through the estimator."""
    torch.set_num_threads(1)
    estimator = load_artifact(path, device="cpu").estimator()
    state, out = estimator.init(batch=1), []
    for row, mask in zip(counts, observed, strict=True):
        state, e = estimator.step(
            state, torch.tensor(row, dtype=torch.float64)[None], torch.tensor(mask).double()[None]
        )
        vectors = [t[0].numpy() for t in (e.z, e.z_std, e.rates, e.kinematics, e.kinematics_std)]
        scalars = [float(e.bits[0]), float(e.spikes[0]), float(e.iterations[0])]
        out.append(np.concatenate([*vectors, scalars]))
    return out


# ---- answers -----------------------------------------------------------------------------------


def test_what_is_streamed_is_what_the_estimator_says_at_any_speed(
    service: Service, feeder: Feeder, model_file: Path
) -> None:
    counts, lost = spikes(30), {0, 7, 8, 19}
    observed = np.ones(counts.shape, dtype=bool)
    observed[list(lost)] = False
    observed[12, :3] = False
    sent = [i for i in range(30) if i not in lost]

    def bin_of(session: str, i: int) -> wire.Bin:
        mask = None if observed[i].all() else wire.pack(observed[i], "u1")
        return bin_(session, i, counts[i], mask=mask)

    feeder.subscribe("fast")
    assert feeder.ask(open_("fast"), wire.Opened).kinematic_names == ("vx", "vy")
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
    feeder.ask(open_("slow"), wire.Opened)
    slow: list[wire.Result] = []
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
    got: dict[str, list[wire.Result]] = {name: [] for name in streams}
    for r in feeder.results(36):
        got[r.session].append(r)
    everything = np.ones((12, len(UNITS)), dtype=bool)
    for name, x in streams.items():
        for result, expected in zip(got[name], offline(model_file, x, everything), strict=True):
            np.testing.assert_allclose(numbers(result), expected, rtol=0, atol=1e-12)
    infos = {i.session: i for i in feeder.ask(wire.Sessions(), wire.SessionList).sessions}
    assert infos["side1"].bins == infos["side1"].statuses["ok"] == 12
    assert infos["side1"].solve_p99_ns >= infos["side1"].solve_p50_ns > 0


def test_credits_come_back(feeder: Feeder) -> None:
    assert feeder.ask(open_("credits"), wire.Opened).credits == 200
    feeder.send(*(bin_("credits", i, spikes(1)[0]) for i in (0, 1, 2, 5)))
    returned, newest = 0, -1
    while returned < 4:
        credit = feeder.reply_of(wire.Credit)
        returned, newest = returned + credit.credits, credit.index
    assert (returned, newest) == (4, 5)
    assert feeder.ask(wire.Close(session="credits"), wire.Closed).bins == 6


def test_anytime_stops_at_the_deadline_and_says_so(feeder: Feeder) -> None:
    feeder.subscribe("anytime")
    feeder.ask(open_("anytime", deadline_ns=1, anytime=True), wire.Opened)
    feeder.send(*(bin_("anytime", i, x) for i, x in enumerate(spikes(5))))
    for r in feeder.results(5):
        assert (r.iterations, r.status) == (1, "late")
    feeder.subscribe("fixed")
    feeder.ask(open_("fixed", deadline_ns=1), wire.Opened)
    feeder.send(bin_("fixed", 0, spikes(1)[0]))
    (r,) = feeder.results(1)
    assert (r.iterations, r.status) == (2, "late")  # the clock touches flags, never numbers


def test_a_solve_that_raises_is_answered_and_the_run_goes_on(model_file: Path) -> None:
    engine = Engine.load(model_file, ServiceSettings(device="cpu"))

    def work(index: int, counts: NDArray[np.float64]) -> Work:
        return Work(5, index, counts, None, index == 0, 0, 0, 2**62, False)

    first, broken, after = (engine.solve([work(i, np.ones(n))])[0] for i, n in enumerate((7, 9, 7)))
    assert broken.solver == FAILED
    assert broken.spikes == 0
    for a in (first, broken, after):
        assert np.isfinite(a.latent).all()
    (lost,) = engine.solve([Work(6, 0, np.ones(9), None, True, 0, 0, 2**62, False)])
    assert lost.solver == FAILED
    assert len(engine) == 2
    engine.forget(5)
    engine.forget(6)
    assert len(engine) == 0


def test_device_is_checked() -> None:
    assert choose_device("auto").type in {"cpu", "cuda"}
    for name in ("tpu", "mps", "cuda:99", "cpu:x"):
        with pytest.raises(ConfigError, match="device"):
            choose_device(name)


# ---- who may feed ------------------------------------------------------------------------------


def test_another_feeder_needs_a_higher_epoch(service: Service, feeder: Feeder) -> None:
    feeder.subscribe("mine")
    feeder.ask(open_("mine"), wire.Opened)
    with Feeder(service.ingest, service.results) as thief:
        assert thief.ask(open_("mine"), wire.Refused).field == "epoch"
        assert thief.ask(bin_("mine", 0, spikes(1)[0]), wire.Refused).field == "session"
        feeder.send(bin_("mine", 0, spikes(1)[0]))
        assert feeder.results(1)[0].status == "ok"
        thief.ask(open_("mine", epoch=1), wire.Opened)
        assert feeder.notice("restarted").epoch == 0
        assert feeder.reply_of(wire.Closed).bins == 1
        assert feeder.ask(bin_("mine", 1, spikes(1)[0]), wire.Refused).field == "session"
        thief.send(bin_("mine", 0, spikes(1)[0], epoch=1))
        (r,) = feeder.results(1)
        assert (r.epoch, r.index) == (1, 0)


def test_a_new_subscriber_alone_gets_the_last_value(service: Service, feeder: Feeder) -> None:
    assert feeder.subscribe("last") == wire.Notice(session="last", epoch=0, what="subscribed")
    feeder.ask(open_("last"), wire.Opened)
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
    feeder.ask(open_("churn"), wire.Opened)
    counts, got = spikes(60), set[int]()
    for i, x in enumerate(counts):
        with Feeder(service.ingest, service.results) as passing:
            for topic in (wire.topic("churn"), b"", b"c"):
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
    described = feeder.ask(wire.Describe(), wire.Described)
    assert described.ready
    assert (described.protocol, described.results) == (wire.PROTOCOL, service.results)
    assert tuple(described.manifest["unit_names"]) == UNITS
    before = time.monotonic_ns()
    probed = feeder.ask(wire.Probe(client_ns=before), wire.Probed)
    assert probed.client_ns == before <= probed.service_ns <= time.monotonic_ns()


# ---- nonsense ----------------------------------------------------------------------------------

GOOD_BIN = wire.encode(bin_("steady", 0, spikes(1)[0]))


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (b"", "message"),
        (b"\xc1", "message"),
        (b"not messagepack", "message"),
        (GOOD_BIN[:-3], "message"),
        (GOOD_BIN + b"\x00", "message"),
        (GOOD_BIN.replace(b"source_ns", b"sauce__ns"), "message"),
        (GOOD_BIN.replace(b"<u2", b"|O8"), "message"),
        (b"\x91" * 100_000, "message"),
        (wire.encode(wire.Closed(session="s", epoch=0, bins=0)), "message"),
        (open_("s", protocol=2), "protocol"),
        (open_("s", units=UNITS[:-1]), "units"),
        (open_("s", units=UNITS[::-1]), "units[0]"),
        (open_("s", bin_width_ns=20_000_000), "bin_width_ns"),
        (bin_("nobody", 0, spikes(1)[0]), "session"),
        (bin_("steady", 3, np.ones(3)), "counts.shape"),
        (wire.Close(session="nobody"), "session"),
    ],
)
def test_a_wrong_message_is_refused_counted_and_disturbs_nothing(
    service: Service, feeder: Feeder, message: wire.Message | bytes, field: str
) -> None:
    counted = f"refused:{field.split('.')[0].split('[')[0]}"
    feeder.subscribe("steady")
    feeder.ask(open_("steady"), wire.Opened)
    before = service.telemetry.counts().get(counted, 0)
    feeder.send(bin_("steady", 0, spikes(1)[0]))
    refused = feeder.ask(message, wire.Refused)
    assert refused.field == field
    feeder.send(bin_("steady", 1, spikes(1)[0]))
    assert [(r.index, r.status) for r in feeder.results(2)] == [(0, "ok"), (1, "ok")]
    assert service.telemetry.counts()[counted] == before + 1
    feeder.ask(wire.Close(session="steady"), wire.Closed)


def test_several_frames_are_refused(feeder: Feeder) -> None:
    for frames in ([b"", b""], [b"", GOOD_BIN], [b"x"] * 50):
        feeder.dealer.send_multipart(frames)
        assert feeder.reply_of(wire.Refused).field == "frames"


def test_an_oversized_message_costs_its_sender_the_connection_only(
    service: Service, feeder: Feeder
) -> None:
    with Feeder(service.ingest, service.results) as big:
        big.ask(wire.Describe(), wire.Described)
        big.send(b"x" * (2 << 20))
        assert feeder.ask(wire.Describe(), wire.Described).ready


def test_random_and_mutated_messages_are_each_refused_or_understood(
    service: Service, feeder: Feeder
) -> None:
    good = [
        *(wire.encode(m) for m in (open_("fuzz"), wire.Describe(), wire.Sessions())),
        wire.encode(wire.Close(session="fuzz")),
        GOOD_BIN,
    ]

    @st.composite
    def mutated(draw: st.DrawFn) -> bytes:
        frame = bytearray(draw(st.sampled_from(good)))
        for _ in range(draw(st.integers(1, 4))):
            frame[draw(st.integers(0, len(frame) - 1))] = draw(st.integers(0, 255))
        return bytes(frame[: draw(st.integers(0, len(frame)))])

    @settings(max_examples=300, deadline=None)
    @given(frame=st.binary(max_size=64) | mutated())
    def send(frame: bytes) -> None:
        feeder.send(frame)
        reply = feeder.reply()
        assert isinstance(
            reply, wire.Refused | wire.Opened | wire.Closed | wire.Described | wire.SessionList
        )
        if isinstance(reply, wire.Opened):
            feeder.ask(wire.Close(session=reply.session, epoch=reply.epoch), wire.Closed)

    send()
    assert service.healthy


# ---- health, addresses, process ----------------------------------------------------------------


def get(address: str, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=WAIT_S) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_http(service: Service, feeder: Feeder) -> None:
    feeder.subscribe("http")
    feeder.send(open_("http"), bin_("http", 2, spikes(1)[0]))
    feeder.results(3)
    feeder.ask(b"?", wire.Refused)
    assert get(service.http, "/healthz") == (200, "ok\n")
    assert get(service.http, "/readyz") == (200, "ok\n")
    assert get(service.http, "/")[0] == 404
    status, text = get(service.http, "/metrics")
    assert status == 200
    values = dict(re.findall(r"^(ilqr_\S+) (\S+)$", text, re.MULTILINE))
    assert float(values['ilqr_bins_total{status="missing"}']) >= 2
    assert float(values['ilqr_refused_total{reason="message"}']) >= 1
    assert float(values["ilqr_gap_total"]) >= 1
    assert float(values["ilqr_ready"]) == 1
    for stage in ("wire_in", "queue", "solve", "publish", "total"):
        assert f'ilqr_{stage}_seconds_bucket{{le="0.05"}}' in values
    assert "http" not in text.replace("http_", "")  # no session's name anywhere
    assert service.telemetry.summary()["latency_ms"]["total"]["max"] > 0


def test_not_ready_is_503() -> None:
    web = Web("127.0.0.1:0", CollectorRegistry(), healthy=lambda: True, ready=lambda: False)
    try:
        assert get(web.address, "/readyz") == (503, "not ready\n")
        assert get(web.address, "/healthz") == (200, "ok\n")
    finally:
        web.close()


@pytest.mark.parametrize("field", ["ingest", "results", "http"])
def test_an_address_in_use_is_a_clear_error(service: Service, model_file: Path, field: str) -> None:
    options = ServiceSettings(**(FREE | {field: getattr(service, field)}), device="cpu")
    with pytest.raises(ServiceError, match=field):
        Service(Engine.load(model_file, options), options).start()
    for beyond in ("tcp://0.0.0.0:*", "tcp://*:5555"):
        if field != "http":
            options = ServiceSettings(**(FREE | {field: beyond}), device="cpu")
            with pytest.raises(ServiceError, match="loopback"):
                Service(Engine.load(model_file, options), options).start()


def run(*args: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "ilqr_vae.cli", "serve", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_process_from_ready_to_sigterm(model_file: Path, tmp_path: Path) -> None:
    process = run(
        *(str(model_file), "--ingest", FREE["ingest"], "--results", FREE["results"]),
        *("--http", FREE["http"], "--device", "cpu", "--log", "json", "--ready-file", "-"),
    )
    assert process.stdout is not None
    try:
        ready = json.loads(process.stdout.readline())
        assert ready["pid"] == process.pid
        with Feeder(ready["ingest"], ready["results"]) as feeder:
            feeder.subscribe("s")
            feeder.ask(open_("s"), wire.Opened)
            feeder.send(*(bin_("s", i, x) for i, x in enumerate(spikes(40))))
            # the service has taken all of them once it answers what was asked after them
            feeder.ask(wire.Probe(client_ns=0), wire.Probed)
            process.send_signal(signal.SIGTERM)
            assert [r.index for r in feeder.results(40)] == list(range(40))
            assert feeder.notice("shutdown").session == "s"
            assert feeder.reply_of(wire.Closed).bins == 40
        _, log = process.communicate(timeout=WAIT_S)
        assert process.returncode == 0
        last = json.loads(log.splitlines()[-1])
        assert last["message"] == "stopped"
        assert last["data"]["counts"]["status:ok"] == 40
        assert last["data"]["latency_ms"]["total"]["n"] == 40
    finally:
        process.kill()
        process.communicate()


def test_what_is_wrong_at_the_start_ends_with_an_error(
    service: Service, model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, config = tmp_path / "broken.safetensors", tmp_path / "service.toml"
    broken.write_bytes(b"not a model")
    config.write_text('devise = "cpu"\n')
    model = str(model_file)
    for args, code, said in [
        ([str(broken)], 2, ""),
        ([str(tmp_path / "absent.safetensors")], 2, ""),
        ([model, "--config", str(config)], 2, "'devise'"),
        ([model, "--device", "tpu"], 2, "device"),
        ([model, "--log", "xml"], 2, "log"),
        ([model, "--ingest", service.ingest, "--http", ""], 3, "ingest: expected an address"),
        ([model, "--ingest", "tcp://0.0.0.0:5555"], 3, "loopback"),
    ]:
        assert main(["serve", *args]) == code
        err = capsys.readouterr().err
        assert err.splitlines()[-1].startswith("error: ")
        assert said in err
