"""The CUDA step compiled for the CPU, for tests; see ``host.h``."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ilqr_vae.kernels.gpu.step import Shape, source

_HERE = Path(__file__).parent
#: Names of a model's arrays, in no particular order: what the source refers to.
FIELDS = (
    *("Wz", "bz", "Wh", "bh", "Wu", "C", "b", "limit", "precision", "gain", "floor", "soft"),
    *("read_C", "read_b", "read_gain", "believed", "centre", "weight", "prior_precision"),
    *("prior_covariance", "mean_rates", "bound_counts", "latent_centre", "latent_reach"),
    *("latent_lost", "decode_centre", "decode_reach", "W", "offset", "Ut", "U", "c", "O", "Cr"),
    *("A", "a", "P", "p", "G", "g", "variance", "stated_gain", "kappa", "decode_mean", "spread"),
)


@dataclass
class Host:
    """What ``nvrtc.Kernel`` offers, on the CPU.

    Attributes:
        order: of a block's threads, see ``host.h``.
    """

    code: ctypes.CDLL
    order: int = 0
    multiprocessors: int = 2
    resident: int = 3

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of shared and of global memory that a block needs."""
        shared, window = (ctypes.c_longlong * 2).in_dll(self.code, "sizes")
        return shared, window

    @property
    def window(self) -> int:
        return self.sizes[1]

    def launch(self, argument: bytes, blocks: int, stream: int) -> None:
        kept = ctypes.create_string_buffer(argument, len(argument))
        assert self.code.launch(kept, blocks, self.order) == 0, "threads wait for each other"


def build(shape: Shape, fields: tuple[str, ...]) -> Host:
    """The kernel with blocks of as many threads as it needs at least."""
    text = source(shape, fields, (_HERE / "host.h").read_text())
    text += (_HERE / "run.h").read_text()
    with tempfile.TemporaryDirectory() as folder:
        code, library = Path(folder, "step.cpp"), Path(folder, "step.so")
        code.write_text(text)
        command = ["g++", "-std=c++17", "-O1", "-w", "-U_FORTIFY_SOURCE", "-shared", "-fPIC"]
        ran = subprocess.run(
            [*command, str(code), "-o", str(library)], capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stderr[:4000]
        return Host(ctypes.CDLL(str(library)))
