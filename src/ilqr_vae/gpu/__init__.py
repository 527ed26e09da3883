"""GPU kernels of everything but the LQR recursion (``ilqr_vae.lqr``), in Triton.

``launch`` says what fits and how it is launched. A ``*_kernels`` module holds Triton code alone,
the module beside it its torch side.
"""
