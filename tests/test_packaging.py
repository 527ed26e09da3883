"""What a user installs, types and reads fits together: verbs, wheel, constraints, README, image."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.main import get_command

from ilqr_clients import ServiceClient
from ilqr_service.settings import ServiceSettings, http_address, load_settings
from ilqr_training.config import load_config
from ilqr_vae.cli import GROUP, SUMMARIES, main
from ilqr_vae.files import read_toml
from ilqr_vae.simulated.disturbance import Script

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
VERBS = PROJECT["project"]["entry-points"][GROUP]
_TORCH_PINS = ("triton", "cuda-bindings", "nvidia-cuda-nvrtc")


@cache
def options(verb: str) -> frozenset[str]:
    """Every option that a verb or one of its parts takes, from the code itself."""
    command = get_command(next(e for e in entry_points(group=GROUP) if e.name == verb).load())
    every = [command, *getattr(command, "commands", {}).values()]
    return frozenset(o for c in every for p in c.params for o in (*p.opts, *p.secondary_opts))


def test_every_verb_has_a_summary_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(SUMMARIES) == set(VERBS)
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    for verb, summary in SUMMARIES.items():
        assert f"  {verb} " in said
        assert summary in said


def test_ctrl_c_while_a_verb_is_loading_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: EntryPoint) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(EntryPoint, "load", interrupted)
    assert main(["train"]) == 130


@pytest.mark.parametrize("swallowed", [False, True])
def test_ctrl_c_in_a_verb_is_one_line(
    swallowed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Destroyed:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    def verb() -> None:
        if not swallowed:
            raise KeyboardInterrupt
        Destroyed()  # of no name: it is destroyed at once, and Python only reports the exception
        for _ in range(10**9):  # until the interrupt is raised again
            pass

    app = typer.Typer()
    app.command()(verb)
    monkeypatch.setattr(EntryPoint, "load", lambda _: app)
    assert main(["train"]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


@pytest.mark.parametrize(
    ("command", "said"),
    [("record rat --out rat.nwb", "interrupted: nothing came"), ("monitor --once", "interrupted")],
)
def test_what_is_interrupted_before_there_was_an_answer_has_not_succeeded(
    command: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(_: ServiceClient) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ServiceClient, "describe", interrupted)
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 130
    assert capsys.readouterr() == ("", f"{said}\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("imported", ["ilqr_vae.cli", "typer", "numpy"])
def test_ctrl_c_in_an_import_ends_the_program(imported: str) -> None:
    code = f"""
import signal, sys
class AtImport:
    def find_spec(self, name, *_):
        if name == {imported!r}:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, AtImport())
sys.argv[1:] = ["train", "no.toml"]
from ilqr_vae.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("ilqr-vae s", {"serve", "simulate", "sweep"}),
        ("ilqr-vae replay --sp", {"--speed", "--span"}),
    ],
)
def test_a_shell_completes_verbs_and_options(
    typed: str,
    offered: set[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("_ILQR_VAE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    assert main([]) == 0
    assert set(capsys.readouterr().out.split()) == offered


def commands(text: str) -> list[list[str]]:
    """The ``ilqr-vae`` command lines in a text's indented or fenced blocks, words split."""
    lines = re.findall(r"^ilqr-vae (.+)$", text, re.MULTILINE)
    return [line.split() for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_page_names_what_there_is(page: Path) -> None:
    text = page.read_text()
    for words in commands(text):
        assert words[0] in VERBS
        assert {w for w in words if w.startswith("--")} <= options(words[0]), words
    for _, link in re.findall(r"\[([^]]*)\]\(([^)#]+)[^)]*\)", text):
        known = link.startswith("https://") or (page.parent / link).exists()
        assert known, link
    for target in re.findall(r"^make ([a-z]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_the_pages_configurations_and_ours_are_valid(tmp_path: Path) -> None:
    blocks = [b for p in PAGES for b in re.findall(r"```toml\n(.*?)```", p.read_text(), re.DOTALL)]
    assert len(blocks) >= 5
    for block in blocks:
        path = tmp_path / "config.toml"
        path.write_text(block)
        if "[[change]]" in block:
            assert read_toml(path, Script).change
        else:
            load_config(path)
    for path in (ROOT / "configs").glob("*.toml"):
        if path.name != "service.toml":
            load_config(path)
    assert load_settings(ROOT / "configs" / "service.toml", {}) == ServiceSettings()


def test_the_wheel_holds_all_four_packages_and_their_data(tmp_path: Path) -> None:
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for package in ("ilqr_vae", "ilqr_training", "ilqr_service", "ilqr_clients"):
        assert f"{package}/__init__.py" in names
        assert f"{package}/py.typed" in names
    assert "ilqr_vae/report/page.html.j2" in names
    tops = {name.partition("/")[0] for name in names}
    assert len(tops) == 5  # and the metadata: no tests, no configs


def test_constraints_pin_every_direct_dependency_above_its_floor() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {canonicalize_name(p.name): next(iter(p.specifier)).version for p in pins}
    extras = PROJECT["project"]["optional-dependencies"]
    for text in (*PROJECT["project"]["dependencies"], *(x for e in extras.values() for x in e)):
        need = Requirement(text)
        # torch's CUDA builds ask for one of these each: a pin here would rule them out
        if need.name not in {PROJECT["project"]["name"], *_TORCH_PINS}:
            assert need.specifier.contains(versions[canonicalize_name(need.name)]), text


def test_the_image_is_built_from_what_there_is_and_probes_the_right_port() -> None:
    docker = (ROOT / "Dockerfile").read_text()
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for sources in re.findall(r"^COPY (.+) \S+$", docker, re.MULTILINE):
        for source in sources.split():
            name = source.removeprefix("./")
            assert (ROOT / name).exists()
            assert f"!{name}" in ignored
    _, port = http_address(ServiceSettings().http)
    assert f"http://127.0.0.1:{port}/readyz" in docker
    assert re.search(r"^USER ilqr$", docker, re.MULTILINE)
    entry = re.search(r"^CMD \[(.+)\]$", docker, re.MULTILINE)
    assert entry is not None
    words = re.findall(r'"([^"]+)"', entry[1])
    assert words[0] in VERBS
    assert {w for w in words if w.startswith("--")} <= options(words[0])
    service = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["service"]
    cache_folder = re.search(r"NUMBA_CACHE_DIR=(\S+)", docker)
    assert cache_folder is not None
    mounted = {volume.split(":")[1] for volume in service["volumes"] if "}" not in volume}
    assert cache_folder[1] in mounted
    prometheus = (ROOT / "configs" / "prometheus" / "prometheus.yml").read_text()
    assert f"127.0.0.1:{port}" in prometheus


def test_make_says_what_it_can_do_and_refuses_an_old_python() -> None:
    make = ["make", "--no-print-directory", "-C", str(ROOT)]
    said = subprocess.run([*make, "help"], capture_output=True, text=True, check=True).stdout
    for target in ("demo", "test", "check", "clean"):
        assert f"make {target}" in said
    old = subprocess.run(
        [*make, "-B", "install", "PYTHON="], capture_output=True, text=True, check=False
    )
    assert old.returncode == 2
    assert "error: PYTHON: expected Python 3.11 or newer" in old.stderr
