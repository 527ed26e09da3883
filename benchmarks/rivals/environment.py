"""Separate Python environments for rivals, so that the project need not depend on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

#: Names a Python that has the rivals; otherwise environments are created once, below ``HOME``.
VARIABLE = "ILQR_VAE_RIVALS"
HOME = Path.home() / ".cache"


@dataclass
class Environment:
    """The packages that a rival needs.

    Attributes:
        folder: folder of the environment to create if no available Python has them.
        packages: requirements for pip.
        modules: modules that they provide.
    """

    folder: str
    packages: tuple[str, ...]
    modules: tuple[str, ...]
    _found: tuple[str | None, str] | None = field(default=None, init=False)
    _until: float | None = field(default=None, init=False)
    _finding: threading.Lock = field(default_factory=threading.Lock, init=False)

    def _complete(self, python: str) -> bool:
        wanted = "import " + ", ".join(self.modules)
        ran = subprocess.run([python, "-c", wanted], capture_output=True, check=False)
        return ran.returncode == 0

    def python(self) -> tuple[str | None, str]:
        """Return a Python with the packages, or None and why; the first call installs them."""
        with self._finding:
            if self._found is None:
                self._found = self._find()
            return self._found

    def _find(self) -> tuple[str | None, str]:
        home = HOME / self.folder
        made = str(home / "bin" / "python")
        for candidate in (os.environ.get(VARIABLE), sys.executable, made):
            if candidate and Path(candidate).exists() and self._complete(candidate):
                return candidate, ""
        left = 600.0 if self._until is None else max(1.0, self._until - time.monotonic())
        try:
            venv.create(home, with_pip=True)
            pip = [made, "-m", "pip", "install", "-q", *self.packages]
            ran = subprocess.run(pip, capture_output=True, text=True, check=False, timeout=left)
        except subprocess.TimeoutExpired as error:
            return None, f"not installed within {error.timeout:.0f} s"
        except (OSError, subprocess.SubprocessError) as error:
            return None, f"cannot be installed: {str(error)[:200]}"
        if ran.returncode != 0 or not self._complete(made):
            return None, f"does not install: {(ran.stderr.strip().splitlines() or ['?'])[-1][:200]}"
        return made, ""

    def lines(
        self, script: Path, arrays: dict[str, Any], seconds: float, timeout: float, **variables: str
    ) -> list[dict[str, Any]] | str:
        """Return the JSON lines that ``script FILE.npz SECONDS`` prints, or why there are none."""
        interpreter, why = self.python()
        if interpreter is None:
            return why
        with tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder) / "given.npz")
            np.savez(file, **arrays)
            try:
                ran = subprocess.run(
                    [interpreter, str(script), file, str(seconds)],
                    capture_output=True,
                    text=True,
                    check=False,
                    timeout=timeout,
                    env=os.environ | variables,
                )
            except subprocess.TimeoutExpired:
                return f"not done within {timeout:.0f} s"
        if ran.returncode != 0:
            return f"failed: {(ran.stderr.strip().splitlines() or ['?'])[-1][:200]}"
        return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]

    def beside(self, work: Callable[[], object], patience: float) -> None:
        """Find or install the packages while the caller does other work.

        Args:
            patience: time limit in seconds; packages not installed by then are unavailable.
        """
        self._until = time.monotonic() + patience
        finding = threading.Thread(target=self.python, daemon=True)
        finding.start()
        work()
        finding.join()
