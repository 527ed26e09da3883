"""Replay of a service's journal: the service's own verb, as a child process.

Running a journal again takes the engine, which clients do without.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ilqr_vae.errors import ConfigError


def verify_journal(
    journal: Path, models: list[Path], *, tolerance: float = 0.0, json_file: Path | None = None
) -> int:
    """Run ``ilqr-vae verify``; its exit code.

    Args:
        models: the files that were served.
        tolerance: largest difference allowed; 0 is bit for bit.
        json_file: where to write the numbers; ``-`` is stdout.

    Raises:
        ConfigError: no model file is named.
    """
    if not models:
        raise ConfigError("--model", expected="the model files that were served", got="none")
    named = [argument for model in models for argument in ("--model", str(model))]
    named += ["--tolerance", repr(tolerance)]
    named += [] if json_file is None else ["--json", str(json_file)]
    command = [sys.executable, "-m", "ilqr_vae.cli", "verify", str(journal), *named]
    return subprocess.run(command, check=False).returncode
