"""Streams that begin anew where the recording does: at every ``Recording.breaks``."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import torch
from numpy.typing import NDArray

from ilqr_vae.horizon import HorizonState, MovingHorizon


def restarted(
    estimator: MovingHorizon, state: HorizonState, rows: NDArray[np.bool_]
) -> HorizonState:
    """The state with the streams ``rows`` (S,) as they are before their first bin."""
    if not rows.any():
        return state
    fresh, picked = estimator.init(len(rows)), torch.as_tensor(rows)
    made: dict[str, torch.Tensor] = {}
    for f in fields(HorizonState):
        old, new = getattr(state, f.name), getattr(fresh, f.name)
        chosen = picked.to(old.device).view(-1, *[1] * (old.ndim - 1))
        made[f.name] = torch.where(chosen, new, old)
    return HorizonState(**made)
