"""The one primitive: batches of time-varying LQR problems, solved by interchangeable backends."""

from ilqr_vae.lqr.dispatch import marginal_covariance, solve_lqr
from ilqr_vae.lqr.types import LQRProblem, LQRSolution

__all__ = ["LQRProblem", "LQRSolution", "marginal_covariance", "solve_lqr"]
