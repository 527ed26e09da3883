"""Replay of a service's journal: the service's own verb, as a child process.

Running a journal again takes the engine, which clients do without.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ilqr_vae.errors import ConfigError


def verify_journal(journal: Path, models: list[Path]) -> int:
    """Run ``ilqr-vae verify``; its exit code. Raises ConfigError: no model file is named."""
    if not models:
        raise ConfigError("--model", expected="the model files that were served", got="none")
    named = [argument for model in models for argument in ("--model", str(model))]
    command = [sys.executable, "-m", "ilqr_vae.cli", "verify", str(journal), *named]
    return subprocess.run(command, check=False).returncode
