"""Causal latents of a recording: the streaming estimator run over many pieces in parallel.

To fit readouts and to validate during training, a span is cut into pieces that run as parallel
streams, each after a run-in on the bins before it. With ``streams=1`` the pass is exact: one
stream, bin by bin, as in the service.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ilqr_training.readout.restarts import delayed_inputs, moved_back, restarted
from ilqr_vae.inference.problem import Status
from ilqr_vae.progress import SILENT, Progress
from ilqr_vae.recordings import Recording
from ilqr_vae.streaming.ensemble import Horizon
from ilqr_vae.streaming.fixed_lag import FixedLags
from ilqr_vae.streaming.state import INPUT_DELAY
from ilqr_vae.streaming.unit_watch import UnitWatch


@dataclass(frozen=True)
class Causal:
    """Estimates for each bin of a span, in order.

    Attributes:
        window: (T, F) features x of the readout at each bin; the first n columns are z.
        latent_std: (T, n).
        covariance: (T, n, n) covariance of z.
        rates: (T, N), expected counts per bin.
        kinematics, kinematics_std: (T, D).
        inputs: (T, m) input of each bin, inferred ``INPUT_DELAY`` bins later (a bin alone says
            little about its own input); NaN for the last bins of a segment.
        bits, spikes: (T,), see ``horizon.Estimate``.
        statuses: solver status -> number of bins.
        iterations: mean number of iterations per bin.
        recalled: (T, 1 + L N) float32, further features of the recurrent layer: the number of bins
            in the window, and their counts; None without such a layer.
        masked: (T, N), True for units that were masked at each bin; None if units were not watched.
        projected: (T, K + 1, D), terms of fixed-lag decodes (``model.fixed_lag``); None without
            them.
        scales: (K, D) factors of their deviations.
    """

    window: NDArray[np.float64]
    latent_std: NDArray[np.float64]
    covariance: NDArray[np.float64]
    rates: NDArray[np.float64]
    kinematics: NDArray[np.float64]
    kinematics_std: NDArray[np.float64]
    inputs: NDArray[np.float64]
    bits: NDArray[np.float64]
    spikes: NDArray[np.float64]
    statuses: dict[str, int]
    iterations: float
    recalled: NDArray[np.float32] | None = None
    masked: NDArray[np.bool_] | None = None
    projected: NDArray[np.float64] | None = None
    scales: NDArray[np.float64] | None = None

    def later(
        self, lag: int, breaks: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return decodes and deviations (T, D) after ``lag`` later bins, or the first ones without.

        Args:
            breaks: bins of the span where a segment begins.
        """
        assert self.projected is not None  # checked by the caller
        assert self.scales is not None
        decoded, std = self.kinematics.copy(), self.kinematics_std.copy()
        t = np.arange(lag, len(decoded))
        within = np.searchsorted(breaks, t, "right") == np.searchsorted(breaks, t - lag, "right")
        t = t[within]
        decoded[t - lag] += self.projected[t, lag] - self.projected[t - lag, 0]
        std[t - lag] *= self.scales[lag - 1]
        return decoded, std

    def rows(self, keep: NDArray[np.bool_]) -> Causal:
        """Return the chosen bins."""
        arrays: dict[str, Any] = {
            f.name: value[keep]
            for f in fields(self)
            if f.name != "scales" and isinstance(value := getattr(self, f.name), np.ndarray)
        }
        return replace(self, **arrays)

    @property
    def bits_per_spike(self) -> float:
        return float(self.bits.sum() / max(self.spikes.sum(), 1.0))


def causal_pass(
    estimator: Horizon,
    recording: Recording,
    start: int,
    stop: int,
    *,
    streams: int = 1,
    run_in: int = 100,
    dropped: NDArray[np.bool_] | None = None,
    watch: bool = False,
    progress: Progress = SILENT,
    what: str = "streaming offline",
) -> Causal:
    """Return estimates for the bins [start, stop).

    Args:
        recording: the recording, with only the model's units.
        streams: number of parallel pieces; one is the exact stream.
        run_in: number of bins before each piece that are streamed but not returned (fewer at bin
            0).
        dropped: (T,), True for bins of the recording to treat as missing.
        watch: mask implausible units, as the service can (``unit_watch.UnitWatch``); requires a
            single stream.
        progress: receives the number of finished bins per piece, as ``what``.

    Raises:
        ValueError: ``watch`` is set with several streams.
    """
    if watch and streams != 1:
        raise ValueError("watch: units are watched in one stream")
    n_bins = stop - start
    streams = max(1, min(streams, n_bins))
    length = -(-n_bins // streams)
    streams = -(-n_bins // length)
    first = start + length * np.arange(streams)
    lead = min(run_in, start) if streams == 1 else run_in
    like = estimator.mean_rate
    seen = recording.mask() if dropped is None else recording.mask() & ~dropped[:, None]
    fresh = np.zeros(len(recording), dtype=bool)
    fresh[[0, *recording.breaks]] = True

    counted = recording.counted
    units = UnitWatch.fresh(counted) if watch else None
    readout = estimator.readout
    direct = None if readout is None else readout.W.shape[1]
    reads = 0 if readout is None else readout.shape.features(readout.n, recording.n_units)
    lags = FixedLags(estimator)
    delay = min(INPUT_DELAY, estimator.config.horizon - 1)
    state = estimator.init(streams)
    kept: dict[str, list[torch.Tensor]] = {}
    masked: list[NDArray[np.bool_]] = []
    tally = torch.zeros(len(Status), dtype=torch.int64)
    iterations = 0
    for j in range(-lead, length):
        bins = first + j
        # bins of a run-in before the start of the recording are missing
        inside = (bins >= 0) & (bins < stop)
        index = np.clip(bins, 0, stop - 1)
        # row by row: all bins at once in float64 take much memory for a long recording
        counts = torch.as_tensor(recording.counts[index].astype(np.float64)).to(like)
        observed = seen[index] & inside[:, None]
        believed = observed.copy()
        if units is not None:
            believed[:, :counted] &= ~units.masked
        mask = torch.as_tensor(believed.astype(np.float64)).to(like)
        again = fresh[index] & inside
        state = restarted(estimator, state, again)
        state, answer = estimator.step(state, counts, mask)
        progress(what, j + lead + 1, length + lead)
        held = None if units is None else units.masked
        if units is not None:
            one = recording.counts[bins[0]], observed[0], again[0], answer.rates
            units = _watched(units, *one)
        if j < 0:
            continue
        if held is not None:
            masked.append(held)
        kept.setdefault("window", []).append(answer.window[:, :direct])
        if direct is not None and reads > direct:
            kept.setdefault("recalled", []).append(answer.window[:, direct:reads].float())
        for name in ("z_cov", "rates", "kinematics", "kinematics_std", "bits", "spikes"):
            kept.setdefault(name, []).append(getattr(answer, name))
        if lags.lags:
            projected = torch.from_numpy(lags.project(answer.window.cpu().numpy()))
            kept.setdefault("projected", []).append(projected)
        kept.setdefault("inputs", []).append(delayed_inputs(state.published, delay))
        tally += torch.bincount(answer.status.cpu(), minlength=len(Status))
        iterations += int(answer.iterations.sum())

    def in_order(name: str, dtype: torch.dtype = torch.float64) -> NDArray[Any]:
        # (length, streams, ...) -> concatenated pieces, cut at the end of the span
        x = torch.stack(kept.pop(name)).transpose(0, 1).to(dtype).cpu().numpy()
        return x.reshape(streams * length, *x.shape[2:])[:n_bins]

    covariance = in_order("z_cov")
    return Causal(
        window=in_order("window"),
        latent_std=np.sqrt(np.diagonal(covariance, axis1=1, axis2=2)),
        covariance=covariance,
        rates=in_order("rates"),
        kinematics=in_order("kinematics"),
        kinematics_std=in_order("kinematics_std"),
        inputs=moved_back(in_order("inputs"), delay),
        bits=in_order("bits"),
        spikes=in_order("spikes"),
        statuses={s.name.lower(): int(c) for s, c in zip(Status, tally, strict=True) if c},
        iterations=iterations / (streams * length),
        recalled=in_order("recalled", torch.float32) if "recalled" in kept else None,
        masked=np.stack(masked) if watch else None,
        projected=in_order("projected") if lags.lags else None,
        scales=lags.scales if lags.lags else None,
    )


def _watched(
    units: UnitWatch,
    counts: NDArray[Any],
    observed: NDArray[np.bool_],
    again: bool | np.bool_,
    rates: torch.Tensor,
) -> UnitWatch:
    """Update the watch after a bin. The first bin of a stream has no prediction to compare."""
    if again:
        units = replace(units, predicted=np.full_like(units.predicted, np.nan))
    came = observed.any()
    newest = rates[0].double().cpu().numpy()
    return units.after(counts.astype(np.float64) if came else None, observed, newest)
