"""Whether there is a browser to test in."""

from __future__ import annotations

import pytest
from benchmarks.browser import CHROMIUM

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
