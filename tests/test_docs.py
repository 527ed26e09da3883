"""The documentation site builds without a warning, loads nothing from elsewhere, lacks nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from ilqr_service.settings import ServiceSettings
from ilqr_training.config import TrainConfig
from ilqr_vae.cli import SUMMARIES
from ilqr_vae.inference.problem import Status
from ilqr_vae.protocol import messages
from process import ENVIRONMENT

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS / "_ext"))
import error_texts  # noqa: E402
import structs  # noqa: E402

pytest.importorskip("sphinx")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole site, the notebook executed."""
    out = tmp_path_factory.mktemp("site")
    made = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    done = subprocess.run(
        [*made, str(DOCS), str(out)], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stderr
    return out


def text_of(page: Path) -> str:
    return unescape(re.sub(r"<[^>]+>", "", page.read_text()))


def keys(kind: type[msgspec.Struct]) -> Iterator[str]:
    for field in msgspec.structs.fields(kind):
        nested = isinstance(field.type, type) and issubclass(field.type, msgspec.Struct)
        yield from keys(field.type) if nested else [field.name]


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    loading = r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=\"((?:https?:)?//[^\"]+)"
    for page in pages:
        assert re.findall(loading, page.read_text()) == [], page.name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//|@import", sheet.read_text()), sheet.name


def test_the_reference_lacks_nothing(site: Path) -> None:
    reference = site / "reference"
    settings = {"configuration": TrainConfig, "service-settings": ServiceSettings}
    for page, kind in settings.items():
        text = text_of(reference / f"{page}.html")
        assert [key for key in keys(kind) if not re.search(rf"^{key}$", text, re.M)] == []
        assert [k.name for _, _, own in structs.sections(kind) for k in own if not k.meaning] == []
    verbs = text_of(reference / "cli.html")
    assert [verb for verb in SUMMARIES if f"ilqr-vae {verb} [OPTIONS]" not in verbs] == []
    statuses = text_of(reference / "statuses.html")
    known = [*get_args(messages.Status), *(s.name.lower() for s in Status if s is not s.RUNNING)]
    assert [status for status in known if f"\n{status}\n" not in statuses] == []
    errors = text_of(reference / "errors.html")
    shown = {error_texts.shown(error.expected).strip("`") for error in error_texts.collected()}
    assert [text for text in shown | set(error_texts.warnings()) if text not in errors] == []


def test_every_error_has_advice() -> None:
    found = error_texts.grouped()
    assert found.get(None, ()) == ()
    assert len(error_texts.collected()) > 300
    assert len(error_texts.warnings()) > 15
    general = [e for group, errors in found.items() if group and not group.files for e in errors]
    assert len(general) < 20


def test_the_notebook_has_run(site: Path) -> None:
    page = (site / "tutorial" / "notebook.html").read_text()
    assert page.count("<img ") >= 5
    assert "the stated 90 % interval covers" in page
