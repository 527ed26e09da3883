"""What verbs print on a terminal of 80 columns: no line is longer, no name cut, no word broken."""

from __future__ import annotations

import os
import pty
import re
import struct
import sys
import termios
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest

from ilqr_clients.monitor import ServiceState, view
from ilqr_vae.cli import GROUP
from ilqr_vae.protocol.clock import ClockOffset
from ilqr_vae.protocol.requests import SessionInfo
from ilqr_vae.recordings import RecordingSpec
from ilqr_vae.recordings.nwb.write import BehaviourSeries, write_nwb
from ilqr_vae.report.table import Table, lines_of_table
from tiny import config, write_config

WIDTH, HEIGHT = 80, 24
UNITS = tuple(f"sorted_electrode_{i:04d}" for i in range(12))
CHANNELS = ("cursor_velocity_horizontal", "cursor_velocity_vertical")
SECONDS = 30

# Every verb in one process, so that libraries are imported once.
_CHILD = """
import sys
from ilqr_vae.cli import main
for line in sys.argv[1].splitlines():
    print("$", line.split()[0])
    main(line.split())
"""


def in_a_terminal(commands: list[str], encoding: str = "utf-8") -> str:
    """What a terminal of 80 columns shows of these commands, without colours."""
    pid, master = pty.fork()
    if pid == 0:  # the child, with the terminal as its input and output
        import fcntl

        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, WIDTH, 0, 0))
        kept = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        environment = {**kept, "PYTHONIOENCODING": encoding, "TERM": "xterm-256color"}
        words = [sys.executable, "-W", "ignore", "-c", _CHILD, "\n".join(commands)]
        os.execvpe(words[0], words, environment)
    written = b""
    while True:
        try:
            part = os.read(master, 1 << 16)
        except OSError:  # the child has closed the terminal
            break
        if not part:
            break
        written += part
    os.close(master)
    assert os.waitpid(pid, 0)[1] == 0, written.decode(encoding)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode(encoding))


def check(text: str) -> None:
    lines = re.split(r"[\r\n]+", text)
    long = [line for line in lines if len(line.rstrip()) > WIDTH]
    assert not long
    assert "…" not in text
    assert "Traceback" not in text
    for stem, whole in (("sorted_", UNITS), ("cursor_vel", CHANNELS)):
        assert set(re.findall(rf"\b{stem}\w*", text)) <= {*whole, *(f"{c}s" for c in whole)}


def test_every_help_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    verbs = sorted(entry.name for entry in entry_points(group=GROUP))
    text = in_a_terminal(
        [
            "--help",
            *(f"{verb} --help" for verb in verbs),
            "experiment lorenz --help",
            "experiment decode --help",
            "experiment lornez",
            "trian",
            "train --recordin x y",
        ],
        encoding="ascii",
    )
    check(text)
    assert text.count("Show this message and exit.") == len(verbs) + 2
    assert "\\u" not in text
    assert not re.search(r"\w-\r\n", text)  # a word broken at its hyphen
    for near in ("did you mean 'lorenz'?", "did you mean 'train'?", "--recording"):
        assert near in " ".join(text.split())
    helps = text.split("\r\n$ ")
    unsaid = [each.split()[0] for each in helps if each.count("--help") and not _ended(each)]
    assert unsaid == []


def _ended(text: str) -> bool:
    """Whether each option's help is a sentence."""
    options = text.partition("Options:")[2].partition("Example")[0].partition("Commands:")[0]
    texts = re.split(r"\r\n  (?=--)", options.strip())
    plain = [re.sub(r"\s*\[[^\[\]]*\]\s*$", "", " ".join(t.split())) for t in texts]
    return all(t.endswith(".") for t in plain if t)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_every_view_of_long_names_fits(tmp_path: Path, encoding: str) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "session_of_a_monkey_with_a_long_name.nwb"
    moving = np.cumsum(rng.normal(size=(SECONDS * 20, 2)), 0)
    write_nwb(
        path,
        [np.sort(rng.uniform(0, SECONDS, 8 * SECONDS)) for _ in UNITS],
        unit_names=UNITS,
        series=[
            BehaviourSeries(
                name="velocity_of_the_cursor_on_the_screen",
                values=moving - moving.mean(0),
                unit="cm/s",
                rate=20.0,
                channels=CHANNELS,
                description="velocity",
            )
        ],
    )
    settings = config(data=RecordingSpec(bin_width=0.05), steps=4, validate_every=2)
    toml, model = write_config(tmp_path / "c.toml", settings), tmp_path / "m.safetensors"
    small = tmp_path / "small.toml"
    small.write_text("trials = 4\nbins = 12\nbound_samples = 1\n[fit]\nsteps = 2\n")
    quick = "--seeds 1 --no-gru --draws 1 --lost 0.3 --fraction 0.5 --held-out 0"
    commands = [
        f"inspect {path}",
        f"train {toml} --recording {path} --out {model} --check",
        f"train {toml} --recording {path} --out {model}",
        f"inspect {model}",
        f"evaluate {model} --recording {path} --stress --no-gru --held-out 0.25",
        f"experiment autonomous-linear --config {small} --json {tmp_path / 'e.json'}",
        f"experiment decode {toml} --recording {path} --out {tmp_path / 'out'} {quick}",
    ]
    text = in_a_terminal(commands if encoding == "utf-8" else commands[:2], encoding)
    assert str(tmp_path) not in {line[:WIDTH] for line in text.splitlines()}
    check(text.replace(str(tmp_path), "."))
    assert "\\u" not in text
    if encoding == "utf-8":
        assert f"R2 {CHANNELS[0]}" in text
        assert f"{CHANNELS[0]} (cm/s)" in text


def test_the_monitor_fits_a_small_terminal() -> None:
    sessions = tuple(
        SessionInfo(
            session=f"recording_of_the_morning_{i:02d}",
            epoch=0,
            bins=123_456,
            next_index=123_456,
            deadline_ns=50_000_000,
            statuses={"ok": 123_000, "degraded": 300, "late": 100, "missing": 56},
            solve_p50_ns=1_234_567,
            solve_p99_ns=12_345_678,
            bits_per_spike=0.1234,
            idle_ns=0,
            flagged=UNITS[:4],
        )
        for i in range(5)
    )
    shown = ServiceState(
        endpoint="tcp://127.0.0.1:5555",
        model="0123456789ab",
        ready=True,
        device="cpu",
        names=CHANNELS,
        units=("cm/s", "cm/s"),
        sessions=sessions,
        clock=ClockOffset(offset_ns=1_000_000, uncertainty_ns=1000, probes=5, at_ns=0),
    )
    for height in (HEIGHT, 100, None):
        lines = view(shown, WIDTH, height).plain.split("\n")
        check("\n".join(lines))
        assert len(lines) <= (height or 1000)
        assert all(any(s.session in line for line in lines) for s in sessions)
    assert any("more sessions" in line for line in view(shown, WIDTH, HEIGHT).plain.split("\n"))


def test_a_table_that_does_not_fit_becomes_a_list() -> None:
    columns = ("decoder", *(f"R2 {name}" for name in CHANNELS), "95 % interval")
    table = Table("Scores", "", columns, (("a", "0.1", "0.2", "0.1 to 0.3"), ("b", *"123")))
    wide = lines_of_table(table, 110)
    assert [line.split() for line in wide[1:]] == [
        ["a", "0.1", "0.2", "0.1", "to", "0.3"],
        [*"b123"],
    ]
    narrow = lines_of_table(table, 40)
    assert narrow[0] == "a"
    assert narrow[1].split() == ["R2", CHANNELS[0], "0.1"]
    assert max(map(len, narrow)) <= 40
