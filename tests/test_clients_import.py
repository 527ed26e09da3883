"""The clients and the library's torch-free wing load where torch cannot be imported at all."""

import subprocess
import sys

import pytest

BLOCKER = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"no {name} here", name=name)
        return None

sys.meta_path.insert(0, Refuse())
"""

ENGINE = ("torch", "numba", "safetensors", "tensorboard", "jaxtyping", "prometheus_client")

EVERYTHING = """
import importlib, pkgutil
import ilqr_clients, ilqr_vae.report
for package in (ilqr_clients, ilqr_vae.report):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
"""

VERBS = """
import importlib
for verb in ("replay", "monitor", "closed_loop"):
    assert importlib.import_module(f"ilqr_clients.{verb}_cli").app is not None
"""


def run(blocked: tuple[str, ...], code: str) -> subprocess.CompletedProcess[str]:
    program = f"BLOCKED = {set(blocked)!r}\n{BLOCKER}\n{code}"
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_every_client_module_loads_without_the_engine() -> None:
    done = run(ENGINE, EVERYTHING)
    assert done.returncode == 0, done.stderr


PUBLIC = """
import sys
import ilqr_clients
assert "zmq" not in sys.modules
assert ilqr_clients.__all__ == [
    "Answer", "AnswerTimeoutError", "AsyncListener", "AsyncServiceClient", "AsyncSession",
    "ClientKey", "IlqrVaeError", "Listener", "Model", "ProtocolError", "RequestRefusedError",
    "ServiceClient", "ServiceError", "ServiceUnreachableError", "Session", "SessionEndedError",
    "ShapeError", "model_of", "read_client_key",
]
from ilqr_clients import *
from ilqr_clients.sdk import Session as same
assert Session is same and issubclass(SessionEndedError, ServiceError)
assert not hasattr(ilqr_clients, "Sesion")
"""


def test_the_public_names_are_these_and_need_no_engine() -> None:
    done = run(ENGINE, PUBLIC)
    assert done.returncode == 0, done.stderr


def test_the_verbs_load_with_the_base_install_alone() -> None:
    extras = ("matplotlib", "jinja2", "sklearn", "h5py", "pynwb")
    done = run((*ENGINE, *extras), VERBS)
    assert done.returncode == 0, done.stderr


def test_the_blocker_blocks() -> None:
    done = run(ENGINE, "import torch")
    assert done.returncode != 0
    assert "no torch here" in done.stderr


@pytest.mark.parametrize("verb", ["replay", "monitor", "closed-loop"])
def test_help_names_an_example_and_needs_no_torch(verb: str) -> None:
    code = f"import sys\nfrom ilqr_vae.cli import main\nsys.exit(main([{verb!r}, '--help']))"
    done = run(ENGINE, code)
    assert done.returncode == 0, done.stderr
    assert f"Example: ilqr-vae {verb}" in " ".join(done.stdout.split())
