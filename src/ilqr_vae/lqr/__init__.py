"""The primitive: batches of time-varying LQR problems, solved by interchangeable backends."""

from ilqr_vae.lqr.problem import LQRProblem, LQRSolution
from ilqr_vae.lqr.solve import marginal_covariance, solve_lqr

__all__ = ["LQRProblem", "LQRSolution", "marginal_covariance", "solve_lqr"]
