"""The examples in ``clients/examples`` run as a user would run them, against the real service."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ilqr_clients.answer import Answer
from ilqr_clients.sdk import ServiceClient, model_of
from rig import make_model, serving

EXAMPLES = Path(__file__).parents[1] / "clients" / "examples"
UNITS = 5


def run(example: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(EXAMPLES / example), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_plain_client_prints_what_the_sdk_receives(tmp_path: Path) -> None:
    counts = np.random.default_rng(0).poisson(1.0, (20, UNITS))
    np.savetxt(tmp_path / "counts.csv", counts, fmt="%d", delimiter=",")
    with serving(make_model(tmp_path / "m.safetensors", n_units=UNITS)) as service:
        done = run("plain_client.py", service.ingest, str(tmp_path / "counts.csv"))
        with ServiceClient(service.ingest) as client:
            model = model_of(client.describe())
            with client.open("sdk", units=model.unit_names, bin_width=model.bin_width) as session:
                answers = [session.step(index, row) for index, row in enumerate(counts)]
    assert done.returncode == 0, done.stderr
    same_lines(done.stdout, answers)


def same_lines(printed: str, answers: list[Answer]) -> None:
    """An example printed index, status and kinematics of each answer, to the last bit."""
    lines = [line.split() for line in printed.splitlines()]
    assert [(int(k), status) for k, status, *_ in lines] == [(a.index, a.status) for a in answers]
    decoded = np.array([[float(value) for value in line[2:]] for line in lines])
    assert decoded.tobytes() == np.stack([a.kinematics for a in answers]).tobytes()


NEEDED = ("g++", "/usr/include/zmq.h", "/usr/include/msgpack.hpp")


@pytest.mark.skipif(
    not all(shutil.which(one) or Path(one).exists() for one in NEEDED),
    reason="needs g++, libzmq3-dev and libmsgpack-cxx-dev",
)
def test_the_cpp_client_decodes_what_the_sdk_receives(tmp_path: Path) -> None:
    counts = np.random.default_rng(0).poisson(1.0, (20, UNITS))
    np.savetxt(tmp_path / "counts.csv", counts, fmt="%d", delimiter=",")
    program = str(tmp_path / "client")
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-DMSGPACK_NO_BOOST"]
    source = str(EXAMPLES / "client.cpp")
    subprocess.run(["g++", *flags, source, "-o", program, "-lzmq"], check=True, timeout=240)
    with serving(make_model(tmp_path / "m.safetensors", n_units=UNITS)) as service:
        arguments = [service.ingest, str(tmp_path / "counts.csv")]
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)
        with ServiceClient(service.ingest) as client:
            model = model_of(client.describe())
            with client.open("sdk", units=model.unit_names, bin_width=model.bin_width) as session:
                answers = [session.step(index, row) for index, row in enumerate(counts)]
    assert done.returncode == 0, done.stderr
    same_lines(done.stdout, answers)


def test_the_plain_client_says_that_nothing_answers(tmp_path: Path) -> None:
    (tmp_path / "counts.csv").write_text("0,0,0,0,0\n")
    done = run("plain_client.py", "tcp://127.0.0.1:9", str(tmp_path / "counts.csv"))
    assert done.returncode == 1
    assert "no description within 5000 ms" in done.stderr
