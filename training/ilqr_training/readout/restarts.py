"""Restarts of streams at breaks of the recording, and their delayed inputs."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import torch
from numpy.typing import NDArray

from ilqr_vae.streaming.ensemble import Horizon
from ilqr_vae.streaming.state import HorizonState


def reaching(segments: list[tuple[int, int]], bins: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the segments that overlap the bins [start, stop), from their starts, cut at stop."""
    start, stop = bins
    return [(a, min(b, stop)) for a, b in segments if b > start and a < stop]


def delayed_inputs(state: HorizonState, delay: int) -> torch.Tensor:
    """Return inputs (S, m) ``delay`` bins before the newest; NaN in a younger stream."""
    slot = state.age - 1 - delay
    row = torch.arange(len(slot), device=slot.device)
    picked = state.u[row, slot.clamp(min=0)]
    return torch.where((slot >= 0).unsqueeze(1), picked, torch.full_like(picked, torch.nan))


def moved_back(inputs: NDArray[np.float64], delay: int) -> NDArray[np.float64]:
    """Shift delayed inputs (T, m) to their own bins; the last ``delay`` bins are NaN."""
    made = np.full_like(inputs, np.nan)
    if delay < len(inputs):
        made[: len(inputs) - delay] = inputs[delay:]
    return made


def restarted(estimator: Horizon, state: HorizonState, rows: NDArray[np.bool_]) -> HorizonState:
    """Return the state with the streams ``rows`` (S,) reset to before their first bin."""
    if not rows.any():
        return state
    fresh, picked = estimator.init(len(rows)), torch.as_tensor(rows)
    made: dict[str, torch.Tensor] = {}
    for f in fields(HorizonState):
        old, new = getattr(state, f.name), getattr(fresh, f.name)
        chosen = picked.to(old.device).view(-1, *[1] * (old.ndim - 1))
        made[f.name] = torch.where(chosen, new, old)
    return HorizonState(**made)
