"""What holds for every test: one torch thread, so that timings and bits do not depend on the machine.

Shape checking of the library under pytest is switched on in pyproject.toml (``addopts``).
"""

from __future__ import annotations

import torch

torch.set_num_threads(1)
