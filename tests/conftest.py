"""What holds for every test: one torch thread, so that no test depends on the number of cores.

Shape checking of the library under pytest is switched on in pyproject.toml (``addopts``).
"""

from __future__ import annotations

import torch

torch.set_num_threads(1)
