"""Walks a Dockerfile's steps without a container engine, in a folder and an environment of its own.

Every path of the image lies under the folder. What the base image brings is a fresh virtual
environment; ``pip install`` runs as it is written. A user is made by being another user id, with no
privilege, in a user namespace.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path


def instructions(text: str) -> list[tuple[str, str]]:
    """Word and rest of each, comments gone and continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    found: list[tuple[str, str]] = []
    for line in joined.splitlines():
        word, _, rest = line.strip().partition(" ")
        found.append((word, " ".join(rest.split())))
    return found


@dataclass
class Image:
    """What the steps have come to.

    Args:
        source: the folder that is the build's context.
        root: where the image's paths lie.
        fresh: install everything anew, from the network; else what this environment has counts as
            installed, and the project alone is built and installed, without the network.
        arguments: ``--build-arg``.

    Attributes:
        env: of the image, with its paths under ``root``.
        user: who it runs as: name and id.
        health, command: of the image, their paths under ``root``.
    """

    source: Path
    root: Path
    fresh: bool
    arguments: dict[str, str] = field(default_factory=dict[str, str])
    env: dict[str, str] = field(default_factory=dict[str, str])
    work: Path = Path()
    user: tuple[str, int] = ("root", 0)
    users: dict[str, int] = field(default_factory=dict[str, int])
    health: list[str] = field(default_factory=list[str])
    entry: list[str] = field(default_factory=list[str])
    command: list[str] = field(default_factory=list[str])
    steps: list[str] = field(default_factory=list[str])

    def at(self, path: str) -> str:
        """A word of a command: where it is a path of the image, that path under ``root``."""
        return str(self.root / path[1:]) if path.startswith("/") else path

    def build(self) -> None:
        """Take every step. Raises AssertionError: one fails, or is of a kind that is not known."""
        for word, rest in instructions((self.source / "Dockerfile").read_text()):
            step = getattr(self, f"_{word.lower()}", None)
            assert step is not None, f"no such instruction: {word}"
            step(self._filled(rest) if word not in ("RUN", "HEALTHCHECK") else rest)
            self.steps.append(word)

    def _filled(self, text: str) -> str:
        known = self.arguments | self.env
        return re.sub(r"\$\{(\w+)\}", lambda m: known[m[1]], text)

    # ---- instructions --------------------------------------------------------------------------

    def _arg(self, rest: str) -> None:
        name, _, default = rest.partition("=")
        self.arguments.setdefault(name, default)

    def _from(self, rest: str) -> None:
        assert re.fullmatch(r"python:3\.\d+-slim", rest), rest
        venv = self.root / "usr" / "local"
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        self.env = {"PATH": f"{venv / 'bin'}:/usr/bin:/bin", "HOME": str(self.root / "home")}
        if not self.fresh:
            paths = {sysconfig.get_paths()[kind] for kind in ("purelib", "platlib")}
            (lib,) = venv.glob("lib/python3.*/site-packages")
            for old in lib.glob("setuptools*"):  # would hide the newer one outside
                shutil.rmtree(old)
            (lib / "outer.pth").write_text("\n".join(sorted(paths)) + "\n")
            # its odd value is pip's: the variable stands for a flag that switches something off
            self.env |= {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}

    def _env(self, rest: str) -> None:
        for pair in rest.split():
            name, _, value = pair.partition("=")
            self.env[name] = self.at(value)

    def _workdir(self, rest: str) -> None:
        self.work = Path(self.at(rest))
        self.work.mkdir(parents=True)

    def _copy(self, rest: str) -> None:
        *sources, target = rest.split()
        let_in = (self.source / ".dockerignore").read_text().splitlines()
        for source in sources:
            assert f"!{source.removeprefix('./')}" in let_in, source
            path = self.source / source
            if path.is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(path, self.work / target, ignore=ignored)
            else:
                shutil.copy(path, self.work / target)

    def _run(self, rest: str) -> None:
        for part in rest.split(" && "):
            if part.startswith("useradd "):
                found = re.fullmatch(r"useradd .*--uid (\d+) (\w+)", part)
                assert found is not None, part
                self.users[found[2]] = int(found[1])
                continue
            if part.startswith("install -d"):  # whose it is: see ``under``
                part = re.sub(r" -[og] (\w+)", "", part)
            self._shell(part)

    def _shell(self, line: str) -> None:
        done = subprocess.run(
            ["sh", "-euc", line],
            cwd=self.work,
            env=self.arguments | self._outer() | self.env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"

    def _outer(self) -> dict[str, str]:
        """How this machine reaches packages, where it has a way of its own."""
        return {k: v for k, v in os.environ.items() if k.startswith("PIP_") or k.endswith("_proxy")}

    def _user(self, rest: str) -> None:
        self.user = (rest, self.users[rest])

    def _healthcheck(self, rest: str) -> None:
        self.health = json.loads(rest.partition("CMD ")[2])

    def _stopsignal(self, rest: str) -> None:
        assert rest == "SIGTERM"

    def _entrypoint(self, rest: str) -> None:
        self.entry = json.loads(rest)

    def _cmd(self, rest: str) -> None:
        self.command = [self.at(word) for word in json.loads(rest)]

    # ---- to run it -----------------------------------------------------------------------------

    def under(self) -> tuple[str, ...]:
        """A command that becomes the image's user: another id, and no privilege; nothing where
        the system has no user namespaces."""
        _, uid = self.user
        under = ("unshare", "--user", f"--map-user={uid}", f"--map-group={uid}")
        if shutil.which("unshare") is None:
            return ()
        done = subprocess.run([*under, "true"], capture_output=True, check=False)
        return () if done.returncode else under
