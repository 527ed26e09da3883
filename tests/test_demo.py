"""The demo: real verbs as real processes, and nothing left running whatever happens.

That the whole chain runs to its end is in ``test_walk.py``, by the README's own command.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from ilqr_vae.cli import main
from ilqr_vae.commands.children import Interrupted, StepError, interruptible, run, serving
from ilqr_vae.terminal import has_browser
from rig import make_model

pytestmark = pytest.mark.usefixtures("no_orphans")

TINY = """
[model]
latents = 4
inputs = 2
[training]
steps = 2
batch = 2
chunk = 10
validate_every = 0
[estimator]
horizon = 3
iterations = 1
[readout]
steps = 20
recurrent_steps = 20
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    path.write_text(TINY)
    return path


def test_nothing_of_an_earlier_run_is_taken_for_a_result(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A recording that cannot be read: its step's error and code."""
    out, broken = tmp_path / "made here", tmp_path / "mine.nwb"
    out.mkdir()
    stale = [out / name for name in ("report.json", "report.html", "closed-loop.json")]
    for path in stale:
        path.write_text("of an earlier run")
    broken.write_bytes(b"not NWB")
    assert main(["demo", str(config), "--out", str(out), "--recording", str(broken)]) == 2
    said = capfd.readouterr().err
    assert "mine.nwb" in said
    assert said.splitlines()[-1] == "error: train: expected exit code 0, got 2"
    assert not any(path.exists() for path in stale)
    assert broken.read_bytes() == b"not NWB"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("absent.toml",), "config: expected a TOML file"),
        (("{config}", "--recording", "absent.nwb"), "--recording: expected"),
        (("{config}", "--recording", "{config}"), "--recording: expected a .nwb or .mat file"),
        (("{config}", "--speed", "fast"), "--speed: expected a number above zero, or max"),
        (("{config}", "--speed", "0"), "--speed: expected a number above zero, or max"),
        (("{config}", "--out", "{config}"), "--out: expected a folder"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_made(
    options: tuple[str, ...],
    said: str,
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *(o.format(config=config) for o in options)]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_configuration_is_refused_before_anything_is_made(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("[model]\nlatent_size = 4\n")
    assert main(["demo", str(wrong), "--out", str(tmp_path / "out")]) == 2
    said = capfd.readouterr()
    assert "model.latent_size: expected one of the keys" in said.err
    assert said.out == ""
    assert list(tmp_path.iterdir()) == [wrong]


def test_a_missing_package_is_said_before_anything_is_made(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # None in sys.modules is how Python itself marks a module that cannot be imported.
    monkeypatch.setitem(sys.modules, "pynwb", None)
    assert main(["demo", str(config), "--out", str(tmp_path / "out")]) == 2
    assert "demo: expected the package 'pynwb'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_what_it_started(
    config: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "ilqr_vae.cli", "demo", str(config), "--out", str(out)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    with process.stdout as said:
        # Its first step, a simulation of ten minutes, has been announced and begins.
        assert any(b"$ ilqr-vae simulate" in line for line in said)
        process.send_signal(number)
        rest = said.read()
    assert process.wait(60) == 128 + number
    assert b"everything it started has been stopped" in rest
    assert not (out / "session.nwb").exists()


def test_the_service_stops_when_a_step_fails_or_a_signal_comes(tmp_path: Path) -> None:
    model, log = make_model(tmp_path / "m.safetensors", n_units=4), tmp_path / "service.log"
    served: list[psutil.Process] = []

    def fail() -> None:
        with serving(model, log) as ready:
            served.append(psutil.Process(ready.pid))
            run("replay", ["replay", str(tmp_path / "absent.mat"), "--to", ready.ingest])

    def interrupt() -> None:
        with interruptible(), serving(model, log) as ready:
            served.append(psutil.Process(ready.pid))
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StepError) as failed:
        fail()
    assert failed.value.exit_code == 2
    assert "stopped" in log.read_text()
    with pytest.raises(Interrupted):
        interrupt()
    assert len(served) == 2
    assert not any(service.is_running() for service in served)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_service_that_cannot_start_says_why(tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not a model")
    with pytest.raises(StepError, match="error: ") as failed, serving(broken, tmp_path / "log"):
        pass
    assert failed.value.exit_code == 2


def test_no_browser_is_opened_where_nobody_sits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_browser()  # no terminal here
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("CI", "DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    assert not has_browser()
    monkeypatch.setenv("BROWSER", "echo %s")
    assert has_browser()
    monkeypatch.setenv("CI", "1")
    assert not has_browser()
