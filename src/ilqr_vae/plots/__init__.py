"""Matplotlib figures of an ``infer`` result, of arrays, or of answers of the service.

Each function takes numpy arrays (or, where stated, an ``infer`` result), draws into the given axes
or a new figure, and returns the figure. Needs the extra ``report``, but not torch.

>>> from ilqr_vae import plots                                   # doctest: +SKIP
>>> r = model.infer(counts)                                      # doctest: +SKIP
>>> plots.latents(r, bin_width=model.bin_width)                  # doctest: +SKIP
>>> plots.decode(r, truth=velocity, bin_width=model.bin_width)   # doctest: +SKIP
"""

from ilqr_vae.plots.in_trials import averages, input_size, latent_plane, paths, psth
from ilqr_vae.plots.over_time import decode, inputs, latents, raster, rates, residuals
from ilqr_vae.plots.summaries import (
    agreement,
    bars,
    calibration,
    latency,
    learning,
    reliability,
    trials,
)

__all__ = [
    "agreement",
    "averages",
    "bars",
    "calibration",
    "decode",
    "input_size",
    "inputs",
    "latency",
    "latent_plane",
    "latents",
    "learning",
    "paths",
    "psth",
    "raster",
    "rates",
    "reliability",
    "residuals",
    "trials",
]
