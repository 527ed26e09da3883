"""Outputs are whole or absent, TOML becomes a struct or an error that names the key."""

from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import pytest

from ilqr_vae.errors import ConfigError, number_of, spanned
from ilqr_vae.files import PositiveFloat, check_space, read_toml, replacing, to_struct, write_whole


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    write_whole(path, "old")

    def full() -> None:
        with replacing(path, "--json") as part:
            part.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ConfigError, match="--json: expected a file that can be written"):
        full()
    with pytest.raises(ZeroDivisionError), replacing(path):
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]
    assert path.read_text() == "old"


def test_permissions_follow_the_umask_or_what_is_asked(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "open", b"")
        write_whole(tmp_path / "secret", b"", mode=0o600)
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
    assert modes == {"open": 0o640, "secret": 0o600}


def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    pipe, got = tmp_path / "pipe", list[str]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()), daemon=True)
    reader.start()
    write_whole(pipe, "numbers")
    reader.join(10)
    assert got == ["numbers"]
    assert pipe.is_fifo()


def test_a_folder_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a file that can be written"):
        write_whole(tmp_path / "gone" / "out.json", "")


def test_space_is_checked_before_the_work(tmp_path: Path) -> None:
    check_space(tmp_path, 1000, "--out")
    with pytest.raises(ConfigError, match=r"--out: expected \d+ MiB free on the disk of"):
        check_space(tmp_path, 2**62, "--out")


class Inner(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    share: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.5
    kind: Literal["a", "b"] = "a"
    sizes: tuple[PositiveFloat, ...] = ()


class Outer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    inner: Inner = Inner()
    many: tuple[Inner, ...] = ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("inner.share = 1", "inner.share: expected float < 1.0, got 1"),
        ("inner.share = nan", "inner.share: expected float > 0.0, got nan"),
        ("inner.share = '1'", "inner.share: expected float, got str"),
        ("inner.kind = 'c'", "inner.kind: expected one of a, b, got 'c'"),
        ("inner.sizes = [1, inf]", "inner.sizes: expected float <= 1e+300, got inf"),
        ("inner.size = 1", "inner.size: expected one of the keys share, kind, sizes, got an "),
        ("[[many]]\n[[many]]\nshare = 2", "many.share: expected float < 1.0, got 2"),
        ("[[many]]\nshares = 2", "many.shares: expected one of the keys share, kind, sizes"),
        ("outer = 1", "config c.toml: outer: expected one of the keys inner, many, got an unknown"),
        ("inner = ", "config c.toml: expected a readable TOML file, got "),
    ],
)
def test_errors_name_the_key(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_toml(path, Outer)
    assert str(caught.value).startswith(said)
    assert "c.toml" in str(caught.value)


def test_texts_of_one_thing_are_in_the_singular() -> None:
    assert [number_of(n, "bin") for n in (0, 1, 2)] == ["0 bins", "1 bin", "2 bins"]
    assert [spanned("bin", 3, last) for last in (3, 5)] == ["bin 3", "bins 3 to 5"]


def test_what_is_not_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "c.toml", tmp_path / "absent.toml", tmp_path):
        with pytest.raises(ConfigError, match="expected a readable TOML file"):
            read_toml(path, Outer)


def test_a_struct_made_in_python_is_checked_again() -> None:
    assert to_struct(Outer(Inner(0.25)), Outer, "config") == Outer(Inner(0.25))
    with pytest.raises(ConfigError, match=r"inner\.share: expected float > 0\.0, got -1"):
        to_struct(Outer(Inner(-1.0)), Outer, "config")
