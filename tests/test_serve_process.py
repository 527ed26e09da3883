"""Health checks, addresses, and `ilqr-vae serve` as a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from feeder import WAIT_S, Feeder, bin_, open_, spikes
from ilqr_service.server import Service
from ilqr_service.settings import ServiceSettings
from ilqr_service.solving.engine import Engine
from ilqr_service.transport.http import Web
from ilqr_vae.cli import main
from ilqr_vae.errors import ServiceError
from ilqr_vae.protocol import messages

FREE = {"ingest": "tcp://127.0.0.1:*", "results": "tcp://127.0.0.1:0", "http": "127.0.0.1:0"}


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
    feeder.ask(b"?", messages.Refused)
    assert get(service.http, "/healthz") == (200, "ok\n")
    assert get(service.http, "/readyz") == (200, "ok\n")
    status, page = get(service.http, "/")
    assert status == 200
    assert "ilqr-vae dashboard --to" in page
    assert get(service.http, "/nothing")[0] == 404
    status, text = get(service.http, "/metrics")
    assert status == 200
    values = dict(re.findall(r"^(ilqr_\S+) (\S+)$", text, re.MULTILINE))
    assert float(values['ilqr_bins_total{status="missing"}']) >= 2
    assert float(values['ilqr_refused_total{reason="message"}']) >= 1
    assert float(values["ilqr_gap_total"]) >= 1
    assert float(values["ilqr_ready"]) == 1
    for stage in ("wire_in", "queue", "solve", "publish", "total"):
        assert f'ilqr_latency_seconds_bucket{{le="0.05",stage="{stage}"}}' in values
    assert "_created" not in text
    assert 'ilqr_build_info{ilqr_vae="' in text
    gauges = {"ilqr_ready", "ilqr_sessions"}  # go up and down
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    assert {kinds[name] for name in gauges} == {"gauge"}
    assert kinds["ilqr_latency_seconds"] == "histogram"
    for name in ("journal_bytes", "journal_lost", "bins", "refused", "gap", "iterations"):
        assert kinds[f"ilqr_{name}_total"] == "counter"
    assert "http" not in text.replace("http_", "")  # no session's name anywhere
    assert service.telemetry.summary()["latency_ms"]["total"]["max"] > 0


def test_not_ready_is_503() -> None:
    web = Web("127.0.0.1:0", CollectorRegistry(), healthy=lambda: True, ready=lambda: False)
    try:
        assert get(web.address, "/readyz") == (503, "not ready\n")
        assert get(web.address, "/healthz") == (200, "ok\n")
    finally:
        web.close()


def test_whoever_hangs_up_on_the_web_side_is_a_line_in_the_log(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    web = Web("127.0.0.1:0", CollectorRegistry(), healthy=lambda: True, ready=lambda: True)
    host, port = web.address.split(":")
    caplog.set_level("INFO", "ilqr_service")
    try:
        for _ in range(1_000):  # until one is answered when it is gone already
            with socket.create_connection((host, int(port))) as one:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                one.sendall(b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n")
            if caplog.records:
                break
        assert get(web.address, "/healthz") == (200, "ok\n")
    finally:
        web.close()
    assert caplog.records[0].getMessage() == "a web request broke"
    assert "Traceback" not in capfd.readouterr().err


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


def run(*args: str, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "ilqr_vae.cli", "serve", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def test_http_on_ipv6() -> None:
    try:
        web = Web("[::1]:0", CollectorRegistry(), healthy=lambda: True, ready=lambda: True)
    except ServiceError:
        pytest.skip("no IPv6 here")
    try:
        assert web.address.startswith("[::1]:")
        assert get(web.address, "/healthz") == (200, "ok\n")
    finally:
        web.close()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit address space")
@pytest.mark.parametrize(("megabytes", "said"), [(400, "libraries to load"), (1000, "ulimit -v")])
def test_too_little_address_space_is_one_line_and_an_exit_code(megabytes: int, said: str) -> None:
    command = [sys.executable, "-m", "ilqr_vae.cli", "serve", "no.safetensors"]
    limit = f"--as={megabytes << 20}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        ["prlimit", limit, *command],
        capture_output=True,
        text=True,
        env=environment,
        timeout=WAIT_S * 4,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_slow_web_clients_keep_nobody_out_and_no_thread_each() -> None:
    web = Web("127.0.0.1:0", CollectorRegistry(), healthy=lambda: True, ready=lambda: True)
    host, port = web.address.split(":")
    before = threading.active_count()
    slow: list[socket.socket] = []
    try:
        for _ in range(60):
            slow.append(socket.create_connection((host, int(port)), timeout=WAIT_S))
            slow[-1].sendall(b"GET /me")
        assert get(web.address, "/healthz") == (200, "ok\n")
        with contextlib.suppress(ConnectionResetError):
            assert slow[0].recv(1) == b""  # the oldest was ended
        assert threading.active_count() - before < 40
    finally:
        for one in slow:
            one.close()
        web.close()


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGHUP])
def test_process_from_ready_to_signal(model_file: Path, told: signal.Signals) -> None:
    # a process inherits that a signal is ignored, as under nohup
    before = signal.signal(told, signal.SIG_DFL)
    process = run(
        *(str(model_file), "--ingest", FREE["ingest"], "--results", FREE["results"]),
        *("--http", FREE["http"], "--device", "cpu", "--log", "json", "--ready-file", "-"),
    )
    signal.signal(told, before)
    assert process.stdout is not None
    try:
        ready = json.loads(process.stdout.readline())
        assert ready["pid"] == process.pid
        with Feeder(ready["ingest"], ready["results"]) as feeder:
            feeder.subscribe("s")
            feeder.ask(open_("s"), messages.Opened)
            feeder.send(*(bin_("s", i, x) for i, x in enumerate(spikes(40))))
            # the service has taken all of them once it answers what was asked after them
            feeder.ask(messages.Probe(client_ns=0), messages.Probed)
            process.send_signal(told)
            assert [r.index for r in feeder.results(40)] == list(range(40))
            assert feeder.notice("shutdown").session == "s"
            assert feeder.reply_of(messages.Closed).bins == 40
        _, log = process.communicate(timeout=WAIT_S)
        assert process.returncode == 0
        last = json.loads(log.splitlines()[-1])
        assert last["message"] == "stopped"
        assert last["data"]["counts"]["status:ok"] == 40
        assert last["data"]["latency_ms"]["total"]["n"] == 40
    finally:
        process.kill()
        process.communicate()


def test_told_to_stop_while_the_kernels_compile_it_does_not_wait_for_them(
    model_file: Path, tmp_path: Path
) -> None:
    process = run(
        *(str(model_file), "--ingest", FREE["ingest"], "--results", FREE["results"]),
        *("--http", "", "--device", "cpu", "--log", "json", "--ready-file", "-"),
        *("--cpus", str(min(os.sched_getaffinity(0)))),
        NUMBA_CACHE_DIR=str(tmp_path),  # nothing is compiled yet
    )
    assert process.stderr is not None
    said: list[dict[str, Any]] = []
    try:
        while not said or "cpus_solver" not in said[-1]["data"]:  # the thread's last word before
            said.append(json.loads(process.stderr.readline()))
        process.send_signal(signal.SIGTERM)
        out, log = process.communicate(timeout=10 * WAIT_S)
    finally:
        process.kill()
        process.communicate()
    said += [json.loads(line) for line in log.splitlines()]
    assert process.returncode == 0
    assert not out
    assert [one["message"] for one in said].count("warm") == 0
    assert said[-1]["message"] == "stopped while warming up"


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
        ([model, "--config", str(config)], 2, "config: devise: expected"),
        ([model, "--device", "tpu"], 2, "device"),
        ([model, "--log", "xml"], 2, "log"),
        ([model, "--ingest", service.ingest, "--http", ""], 3, "ingest: expected an address"),
        ([model, "--ingest", "tcp://0.0.0.0:5555"], 3, "loopback"),
    ]:
        assert main(["serve", *args]) == code
        err = capsys.readouterr().err
        assert err.splitlines()[-1].startswith("error: ")
        assert said in err
