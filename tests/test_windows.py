"""Clients, training and a CPU service run without what only POSIX systems have, as on Windows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

HIDDEN = """
import importlib, os, pkgutil, select, signal, sys, time
# What other people's libraries need of this system is loaded before it is hidden.
import h5py, multiprocessing, numba, psutil, pynwb, subprocess, tempfile, torch, torch._dynamo, zmq
import prometheus_client, safetensors.torch, tensorboard, matplotlib.pyplot, sklearn.linear_model
for name in ("resource", "fcntl", "termios", "tty", "pty", "pwd", "grp", "syslog", "readline"):
    sys.modules[name] = None
GONE = {
    os: ("fork", "forkpty", "getuid", "geteuid", "getgid", "getegid", "sched_getaffinity",
         "sched_setaffinity", "sched_setscheduler", "sched_param", "SCHED_FIFO", "getloadavg",
         "SCHED_RESET_ON_FORK", "O_DIRECTORY", "O_NONBLOCK", "O_CLOEXEC", "pread", "pwrite",
         "lockf", "F_TLOCK", "fchmod", "fchown", "chown", "killpg", "setsid", "getpgid", "uname",
         "mkfifo", "posix_fadvise", "posix_fallocate", "fdatasync"),
    signal: ("SIGHUP", "SIGKILL", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGPIPE", "SIGALRM", "SIGCHLD",
             "SIGCONT", "SIGSTOP", "setitimer", "alarm", "pthread_kill", "pthread_sigmask",
             "sigwait"),
    select: ("poll", "epoll", "PIPE_BUF"),
    time: ("clock_gettime", "clock_gettime_ns", "CLOCK_MONOTONIC", "CLOCK_BOOTTIME"),
}
for module, names in GONE.items():
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
ours = [m for m in sys.modules if m.partition(".")[0] in
        ("ilqr_vae", "ilqr_clients", "ilqr_service", "ilqr_training")]
assert not ours, ours
for package in ("ilqr_vae", "ilqr_clients", "ilqr_service", "ilqr_training"):
    for found in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        # Triton is for Linux; Ray takes another path where the platform says that it is Windows
        apart = ("ilqr_vae.kernels.gpu.", "ilqr_training.distributed.live",
                 "ilqr_training.distributed.halving")
        if not found.name.startswith(apart):
            importlib.import_module(found.name)
"""

RUN = (
    HIDDEN
    + """
from pathlib import Path
sys.path.insert(0, TESTS)
torch.set_num_threads(1)
from ilqr_clients import ServiceClient
from ilqr_service import logs
from ilqr_service.serve_cli import _check_limits, stop_on_signals
from ilqr_training.fit.train import train
from ilqr_vae.errors import ServiceError
import rig, tiny
folder = Path(FOLDER)
recording = rig.write_recording(folder / "r.mat", n_units=5)
model = folder / "m.safetensors"
train(tiny.config(steps=2, validate_every=0), recording, model)
logs.configure("plain")
_check_limits()
with stop_on_signals(), rig.serving(model) as service, ServiceClient(service.ingest) as client:
    units = [f"unit{i}" for i in range(5)]
    names = client.describe().manifest["unit_names"]
    with client.open("w", units=names, bin_width=rig.BIN_S) as session:
        assert session.step(0, [1] * len(names), 20.0).status in ("ok", "late")
try:
    with rig.serving(model, journal=str(folder / "journal")):
        raise AssertionError("a journal without locks")
except ServiceError as error:
    assert "which Windows has not" in str(error), error
print("done")
"""
)


def test_without_posix(tmp_path: Path) -> None:
    code = f"TESTS, FOLDER = {str(ROOT / 'tests')!r}, {str(tmp_path)!r}\n{RUN}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "done"
