"""The Dockerfile's steps in a fresh environment, and the service as the image starts it.

By default what this environment has installed counts as installed, so that no network is asked, and
the kernels stay uncompiled; CHAOS=full installs everything anew (TORCH_INDEX says where torch comes
from) and compiles.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from dockerfile import Image, instructions
from feeder import UNITS, Feeder, bin_, open_, spikes
from ilqr_vae.protocol import messages
from rig import make_model

ROOT = Path(__file__).parent.parent
FULL = os.environ.get("CHAOS") == "full"
START_S = 300
TEXT = """
# a comment
ARG A=1
RUN one \\
    && two   ${A}
CMD ["x", "/y"]
"""


def test_instructions_are_read_as_docker_reads_them() -> None:
    assert instructions(TEXT) == [
        ("ARG", "A=1"),
        ("RUN", "one && two ${A}"),
        ("CMD", '["x", "/y"]'),
    ]


def needs_the_index_of_torch() -> None:
    """Skips where the Dockerfile's own is out of reach."""
    (address,) = re.findall(r"^ARG TORCH_INDEX=(\S+)", (ROOT / "Dockerfile").read_text(), re.M)
    try:
        socket.create_connection((urlsplit(address).hostname, 443), 10).close()
    except OSError as error:
        pytest.skip(f"{address}: {error}; TORCH_INDEX names another index")


@pytest.mark.chaos
@pytest.mark.timeout(3600 if FULL else 300)
def test_the_images_steps_give_a_service_that_is_healthy_and_not_root(tmp_path: Path) -> None:
    index = os.environ.get("TORCH_INDEX")
    if FULL and not index:
        needs_the_index_of_torch()
    given = {"TORCH_INDEX": index} if index else {}
    image = Image(ROOT, tmp_path / "image", FULL, given)
    image.root.mkdir()
    image.build()
    assert {"FROM", "COPY", "RUN", "USER", "HEALTHCHECK", "ENTRYPOINT", "CMD"} <= set(image.steps)
    assert image.user == ("ilqr", 10001)
    python = shutil.which("python", path=image.env["PATH"])
    assert python is not None
    said = subprocess.run(
        [python, "-c", "import ilqr_service; print(ilqr_service.__file__)"],
        env=image.env,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said.startswith(str(image.root / "usr"))  # the one that was built, not this checkout's

    models = Path(image.at("/models"))
    models.mkdir()
    make_model(models / "model.safetensors", n_units=7, names=UNITS)
    built = sorted(p for p in image.work.rglob("*") if "__pycache__" not in p.parts)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    # as the image starts it, but for the ports, which may be taken here, and the kernels
    ready = tmp_path / "ready"
    ports = ["--ingest", "tcp://127.0.0.1:*", "--results", "tcp://127.0.0.1:*"]
    ports += ["--http", f"127.0.0.1:{port}", "--ready-file", str(ready)]
    env = image.env | ({} if FULL else {"ILQR_VAE_BACKEND": "reference"})
    under = image.under()
    health = [word.replace("9464", port) for word in image.health]
    assert health != image.health
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [*under, *image.entry, *image.command, *ports],
            cwd=image.work,
            env=env,
            stdout=log,
            stderr=log,
        )
    try:
        for _ in range(20 * START_S):  # each takes the time that a Python takes to start
            done = subprocess.run(health, env=env, capture_output=True, check=False)
            if done.returncode == 0 or process.poll() is not None:
                break
        assert done.returncode == 0, (tmp_path / "log").read_text()
        if under:  # in its own eyes; outside it is whoever runs the tests, without privilege
            (line,) = re.findall(r"^CapEff:\s+(\S+)$", status(process.pid), re.MULTILINE)
            assert int(line, 16) == 0
            assert Path(f"/proc/{process.pid}/uid_map").read_text().split()[0] == "10001"
        told = json.loads(ready.read_text())
        with Feeder(told["ingest"], told["results"]) as feeder:
            feeder.subscribe("s")
            feeder.ask(open_("s"), messages.Opened)
            feeder.send(*(bin_("s", i, row) for i, row in enumerate(spikes(5))))
            assert {r.status for r in feeder.results(5)} == {"ok"}
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        done = subprocess.run(health, env=env, capture_output=True, check=False)
        assert done.returncode != 0  # nobody is there to be healthy
    finally:
        process.kill()
        process.wait()
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert lines[-1]["message"] == "stopped"
    # the image's file system is read-only in compose.yaml: nothing is written but the kernels
    assert built == sorted(p for p in image.work.rglob("*") if "__pycache__" not in p.parts)
    assert Path(image.env["NUMBA_CACHE_DIR"]).is_dir()


def status(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


def test_compose_runs_what_the_image_is_made_for() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    assert set(services) == {"service", "gpu", "prometheus", "grafana"}
    assert services["gpu"]["profiles"] == ["gpu"]
    service = services["service"]
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    assert services["prometheus"]["depends_on"]["service"]["condition"] == "service_healthy"
    for one in services.values():
        for volume in one.get("volumes", []):
            name = volume.split(":")[0]
            if name.startswith("./"):
                assert (ROOT / name).exists(), name
