"""Baselines that decode a stream bin by bin without torch: a Kalman filter and a GRU.

They are fitted by ``ilqr-vae train --rivals``, and decode the same bins as the model in ``replay``
and ``closed-loop``. N units, D kinematic channels, H hidden units.
"""

from __future__ import annotations

import io
import zipfile
from collections import deque
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from ilqr_vae.errors import ConfigError, ShapeError
from ilqr_vae.files import write_whole
from ilqr_vae.scoring.baselines import KalmanFilter

Array = NDArray[np.float64]

KALMAN, GRU = "Kalman filter", "GRU"


class OnlineDecoder(Protocol):
    """A causal decoder."""

    def step(self, counts: NDArray[Any] | None, mask: NDArray[np.bool_] | None = None) -> Array:
        """Process the next bin and return its decode (D,).

        Args:
            counts: (N,); None for a missing bin.
            mask: (N,), True where observed; None means all.
        """
        ...


class OnlineKalman:
    """A Kalman filter whose first D state variables are the decoded channels.

    A missing bin is predicted; an unobserved unit has its mean count.

    Args:
        fitted: the filter.
        lag: delay of counts in bins.
        channels: D.
    """

    def __init__(self, fitted: KalmanFilter, lag: int, channels: int) -> None:
        self.fitted, self.lag, self.channels = fitted, lag, channels
        self._state = fitted.init()
        self._waiting: deque[NDArray[Any] | None] = deque()

    def step(self, counts: NDArray[Any] | None, mask: NDArray[np.bool_] | None = None) -> Array:
        if counts is not None and mask is not None:
            counts = np.where(mask, counts, self.fitted.mean_counts)
        self._waiting.append(counts)
        # the first bins are not delayed, as in the fit
        due = self._waiting.popleft() if len(self._waiting) > self.lag else counts
        self._state, decoded = self.fitted.step(self._state, due)
        return decoded[: self.channels]


@dataclass(frozen=True, slots=True)
class GRUWeights:
    """The weights of a GRU, with the gates in the order of torch: reset, update, new.

    Attributes:
        inputs, recurrent: (3H, N) and (3H, H); input_bias, recurrent_bias: (3H,).
        out, out_bias: (D, H) and (D,).
        x_mean, x_std, y_mean, y_std: (N,) and (D,), of the standardised counts and channels.
    """

    inputs: Array
    recurrent: Array
    input_bias: Array
    recurrent_bias: Array
    out: Array
    out_bias: Array
    x_mean: Array
    x_std: Array
    y_mean: Array
    y_std: Array


class OnlineGRU:
    """A GRU that reads zeros for unobserved units."""

    def __init__(self, weights: GRUWeights) -> None:
        self.weights = weights
        self._hidden = np.zeros(weights.recurrent.shape[1])

    def step(self, counts: NDArray[Any] | None, mask: NDArray[np.bool_] | None = None) -> Array:
        w = self.weights
        if counts is not None and mask is not None:
            counts = np.where(mask, counts, 0)
        z = np.zeros(len(w.x_mean)) if counts is None else np.asarray(counts, dtype=np.float64)
        if z.shape != w.x_mean.shape:
            raise ShapeError("counts", expected=f"({len(w.x_mean)},)", got=str(z.shape))
        from_input = w.inputs @ ((z - w.x_mean) / w.x_std) + w.input_bias
        from_hidden = w.recurrent @ self._hidden + w.recurrent_bias
        i, h = np.split(from_input, 3), np.split(from_hidden, 3)
        reset, update = expit(i[0] + h[0]), expit(i[1] + h[1])
        new = np.tanh(i[2] + reset * h[2])
        self._hidden = (1 - update) * new + update * self._hidden
        return (w.out @ self._hidden + w.out_bias) * w.y_std + w.y_mean


@dataclass(frozen=True, slots=True)
class Rivals:
    """The baselines fitted on a recording.

    Attributes:
        bin_width: seconds.
        unit_names, kinematic_names: N and D.
        kalman, lag: the filter and its lag in bins.
        gru: weights of the GRU.
    """

    bin_width: float
    unit_names: tuple[str, ...]
    kinematic_names: tuple[str, ...]
    kalman: KalmanFilter
    lag: int
    gru: GRUWeights

    def decoders(self) -> dict[str, OnlineDecoder]:
        """Return new decoders by name."""
        kalman = OnlineKalman(self.kalman, self.lag, len(self.kinematic_names))
        return {KALMAN: kalman, GRU: OnlineGRU(self.gru)}

    def require(self, unit_names: tuple[str, ...], kinematic_names: tuple[str, ...]) -> None:
        """Raise ConfigError if units or channels differ from a model's."""
        for what, mine, wanted in (
            ("units", self.unit_names, unit_names),
            ("channels", self.kinematic_names, kinematic_names),
        ):
            if mine != wanted:
                other = next((n for n in wanted if n not in mine), "another order")
                raise ConfigError(
                    f"rivals: {what}",
                    expected=f"the model's {len(wanted)}",
                    got=f"{len(mine)} ({other} is not among them)",
                )

    def save(self, path: Path) -> None:
        """Write as .npz. Raises ConfigError."""
        content: dict[str, Any] = {
            "bin_width": self.bin_width,
            "unit_names": np.array(self.unit_names),
            "kinematic_names": np.array(self.kinematic_names),
            "lag": self.lag,
        }
        for name, part in (("kalman", self.kalman), ("gru", self.gru)):
            content |= {f"{name}.{f.name}": getattr(part, f.name) for f in fields(part)}
        written = io.BytesIO()
        np.savez_compressed(written, **content)
        write_whole(path, written.getvalue(), "--rivals")

    @staticmethod
    def load(path: Path) -> Rivals:
        """Read what ``save`` wrote. Raises ConfigError."""
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
                parts: dict[str, Any] = {
                    name: kind(**{f.name: content[f"{name}.{f.name}"] for f in fields(kind)})
                    for name, kind in (("kalman", KalmanFilter), ("gru", GRUWeights))
                }
                return Rivals(
                    bin_width=float(content["bin_width"]),
                    unit_names=tuple(map(str, content["unit_names"])),
                    kinematic_names=tuple(map(str, content["kinematic_names"])),
                    lag=int(content["lag"]),
                    **parts,
                )
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            said = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise ConfigError(
                "--rivals",
                expected="a file that ilqr-vae train --rivals has written",
                got=f"{path.name} ({said})",
            ) from error
