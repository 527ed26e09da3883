"""One switch for everything that has more than one implementation.

``auto`` (the default) takes the compiled code of the tensors' device where there is one for the
families in use (numba on the CPU; on a GPU a CUDA kernel of the streaming step, and Triton kernels
for training), else torch. ``reference`` takes the plain torch definition everywhere. The
environment variable ``ILQR_VAE_BACKEND`` sets it for a process, ``use`` while it runs.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager

import torch

from ilqr_vae.errors import ConfigError

NAMES = ("auto", "reference")
VARIABLE = "ILQR_VAE_BACKEND"


def _checked(name: str, field: str) -> str:
    if name not in NAMES:
        raise ConfigError(field, expected=f"one of {', '.join(NAMES)}", got=repr(name))
    return name


class _Switch:
    """The choice; read from the environment when first asked for."""

    def __init__(self) -> None:
        self.name: str | None = None


_switch = _Switch()


def current() -> str:
    """The backend in use. Raises ConfigError: the environment names another."""
    if _switch.name is None:
        _switch.name = _checked(os.environ.get(VARIABLE, "auto"), VARIABLE)
    return _switch.name


def use(name: str) -> None:
    """Choose for the whole process. Raises ConfigError: not one of ``NAMES``."""
    _switch.name = _checked(name, "backend")


@contextmanager
def using(name: str) -> Generator[None]:
    """Choose for a while (the whole process: for tests and measurements).

    Raises:
        ConfigError: not one of ``NAMES``.
    """
    before = current()
    use(name)
    try:
        yield
    finally:
        _switch.name = before


def device_of(name: str) -> torch.device:
    """``auto`` is cuda where torch sees one, else cpu. Raises ConfigError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError("device", expected="auto, cpu, cuda or cuda:N", got=repr(name)) from error
    if device.type not in {"cpu", "cuda"}:
        raise ConfigError("device", expected="auto, cpu, cuda or cuda:N", got=repr(name))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            "device", expected=f"one of {torch.cuda.device_count()} CUDA devices", got=repr(name)
        )
    return device
