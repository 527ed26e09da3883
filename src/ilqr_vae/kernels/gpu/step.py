"""The moving-horizon step as one CUDA kernel: its source for a model, and its packed argument.

A block of threads takes a stream and does its whole bin: shift, absorb, iterations with their line
search, covariance, readout (``cuda/*.cuh``). Sizes and families are constants of the source, so
that each model has a kernel of its own.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ilqr_vae.kernels.cpu.dynamics import FAMILIES

_FOLDER = Path(__file__).with_name("cuda")
_PARTS = ("block", "model", "lqr", "readout", "window", "step")
#: The largest number of inputs: a warp takes Cholesky's pivots, a column a lane.
LARGEST_M = 32


@dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for.

    Attributes:
        single: float32, else float64.
        n, m, units, horizon: sizes; poisson: how many units, the first ones, are counts.
        family: of the dynamics, a name in ``FAMILIES``.
        student: whether the inputs' prior is a Student's.
        linked: whether the rate of any unit is other than exp(a).
        channels, lags, residuals, hidden, recurrent, direct, features: of the readout.
        in_shared: whether a window's numbers are in shared memory, else in global memory.
    """

    single: bool
    n: int
    m: int
    units: int
    horizon: int
    poisson: int
    family: str
    student: bool
    linked: bool
    channels: int
    lags: int
    residuals: int
    hidden: int
    recurrent: int
    direct: int
    features: int
    in_shared: bool = False

    @property
    def threads(self) -> int:
        """Of a block."""
        wanted = 128 if self.n <= 24 else 256
        return max(wanted, -(-max(self.n, self.m) // 32) * 32)

    @property
    def record(self) -> int:
        """Numbers of an answer."""
        return self.features + self.n**2 + self.units + 2 * self.channels + 2


def source(shape: Shape, fields: Sequence[str], machine: str | None = None) -> str:
    """The kernel's source.

    Args:
        fields: names of the model's arrays, in the order in which they are packed.
        machine: source in place of ``cuda/device.cuh``, for tests.
    """
    constants = {
        "n": shape.n, "m": shape.m, "N": shape.units, "H": shape.horizon,
        "POISSON": shape.poisson, "FAMILY": FAMILIES[shape.family], "D": shape.channels,
        "LAGS": shape.lags, "RESIDUALS": shape.residuals, "HIDDEN": shape.hidden,
        "RECURRENT": shape.recurrent, "DIRECT": shape.direct, "FEATURES": shape.features,
        "THREADS": shape.threads, "RECORD": shape.record, "BITS": shape.record - 2,
    }  # fmt: skip
    flags = {"STUDENT": shape.student, "LINKED": shape.linked, "IN_SHARED": shape.in_shared}
    lines = [f"typedef {'float' if shape.single else 'double'} real;"]
    lines += [f"constexpr int {name} = {value};" for name, value in constants.items()]
    lines += [f"constexpr bool {name} = {str(value).lower()};" for name, value in flags.items()]
    lines += [f"constexpr double EPSILON = {2.0**-23 if shape.single else 2.0**-52!r};"]
    lines += ["#define FIELDS " + ", ".join(f"*{name}" for name in fields)]
    device = (_FOLDER / "device.cuh").read_text() if machine is None else machine
    parts = [(_FOLDER / f"{name}.cuh").read_text() for name in ("arguments", *_PARTS)]
    return "\n".join([*lines, device, *parts])


@dataclass(frozen=True)
class Constants:
    """What of the argument belongs to a model: limits of the solves, then pointers."""

    iterations: int
    backtracks: int
    tolerance: float
    armijo: float
    damping_min: float
    damping_max: float
    nu: float
    constant: float

    def pack(self, initial: Sequence[int], fields: Mapping[str, int]) -> bytes:
        """As ``Arguments`` has it; ``initial`` and ``fields`` are addresses."""
        numbers = (self.tolerance, self.armijo, self.damping_min, self.damping_max)
        return (
            struct.pack("=2q6d", self.iterations, self.backtracks, *numbers, self.nu, self.constant)
            + struct.pack(f"={len(initial)}Q", *initial)
            + struct.pack(f"={len(fields)}Q", *fields.values())
        )


def pack_launch(streams: int, predicts: bool, addresses: Sequence[int]) -> bytes:
    """What of the argument belongs to a launch."""
    return struct.pack(f"=2q{len(addresses)}Q", streams, predicts, *addresses)
