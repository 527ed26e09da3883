"""The page on the architecture names only what is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = [
    ROOT / "src" / "ilqr_vae",
    ROOT / "service" / "ilqr_service",
    ROOT / "training" / "ilqr_training",
    ROOT / "clients" / "ilqr_clients",
]
TEXT = (ROOT / "docs" / "architecture.md").read_text()


def test_every_module_and_folder_named_exists() -> None:
    files = {path.as_posix() for package in PACKAGES for path in package.rglob("*.py")}
    folders = {Path(path).parent.as_posix() for path in files}
    named = set(re.findall(r"`([\w/]+\.py)`", TEXT))
    assert len(named) > 60
    assert {name for name in named if not any(f.endswith(f"/{name}") for f in files)} == set()
    named = set(re.findall(r"([\w/]+)/(?=[\s`,;)])", TEXT))
    assert len(named) > 15
    assert {name for name in named if not any(f.endswith(f"/{name}") for f in folders)} == set()


def test_every_room_is_in_the_picture() -> None:
    picture = TEXT.split("```")[1]
    rooms = {path.parent.name for package in PACKAGES for path in package.glob("*/__init__.py")}
    assert {room for room in rooms if f"{room}/" not in picture} == set()
