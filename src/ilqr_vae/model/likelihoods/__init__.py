"""Observation models, p(o | z), by the names that configs and model files use."""

from ilqr_vae.model.likelihoods.base import Likelihood, Observations, Observed, padded
from ilqr_vae.model.likelihoods.counts import Counts, Poisson, SoftplusPoisson
from ilqr_vae.model.likelihoods.gaussian import Gaussian
from ilqr_vae.model.likelihoods.mixed import CountsAndFeatures

LIKELIHOODS: dict[str, type[Likelihood]] = {
    cls.family: cls for cls in (Poisson, SoftplusPoisson, Gaussian)
}
"""Every likelihood by the name configs and model files use."""

__all__ = [
    "LIKELIHOODS",
    "Counts",
    "CountsAndFeatures",
    "Gaussian",
    "Likelihood",
    "Observations",
    "Observed",
    "Poisson",
    "SoftplusPoisson",
    "padded",
]
