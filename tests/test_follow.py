"""A served model follows its stream: fitted anew beside it, tried in the shadow, swapped in."""

from __future__ import annotations

import threading
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from ilqr_clients.follow import Follower, Verdict
from ilqr_clients.sdk import ServiceClient
from ilqr_service.journal.verify import verify
from ilqr_service.server import Service
from ilqr_training.adapt_cli import read_streamed
from ilqr_vae.artifact import Artifact, save_artifact
from ilqr_vae.errors import RecordingError
from rig import serving
from test_adaptation import CHANGED, NAMES, artifact, rows, shuffled, spikes_of

__all__ = ["artifact"]  # the fixture
FITTED, TRIED = 60.0, 5.0


class Fed:
    """A session that is fed the same counts over and over."""

    def __init__(self, service: Service, counts: NDArray[np.uint16]) -> None:
        self._service, self._counts = service, counts
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.opened = threading.Event()

    def _run(self) -> None:
        client = ServiceClient(self._service.ingest, timeout=60.0)
        with client, client.open("rat-7", units=NAMES, bin_width=0.05, deadline=60.0) as session:
            self.opened.set()
            index = 0
            while not self._stop.wait(0.004):  # leave the fit a core
                session.step(index, self._counts[index % len(self._counts)], timeout=60.0)
                index += 1

    def __enter__(self) -> Fed:
        self._thread.start()
        assert self.opened.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)


def changed() -> NDArray[np.uint16]:
    C, b = rows(0)
    C = C.clone()
    C[CHANGED] *= -1
    return spikes_of(C, b, 12)[1]


def test_units_that_changed_are_learnt_from_the_stream_and_the_journal_verifies(
    artifact: Artifact, tmp_path: Path
) -> None:
    a, file, journal = artifact, tmp_path / "day.safetensors", tmp_path / "journal"
    save_artifact(file, a.manifest, a.model, a.readout, a.mean_rate, a.seen)
    told: list[str] = []
    with (
        serving(file, journal=str(journal)) as service,
        Fed(service, changed()),
        ServiceClient(service.ingest, timeout=60.0) as client,
        closing(
            Follower(
                client,
                "rat-7",
                file,
                policy="automatic",
                seconds=FITTED,
                trial=TRIED,
                say=told.append,
            )
        ) as follower,
    ):
        (made,) = follower.run(attempts=1, threshold=float("inf"))
        assert np.isfinite(follower.index)
        assert made.verdict is Verdict.SWAPPED, made
        assert made.bits is not None
        assert made.bits[1] > made.bits[0]
        serving_now = next(m.model for m in client.models() if m.role == "serving")
        assert serving_now != a.manifest.model_id
    assert any(line.startswith("swapped in") for line in told)
    files = sorted(tmp_path.glob("day*.safetensors"))
    assert len(files) == 2
    verdict = verify(journal, files)
    assert verdict.answers > FITTED / 0.05
    assert verdict.identical == verdict.answers


def test_a_stream_that_fits_nothing_changes_nothing(artifact: Artifact, tmp_path: Path) -> None:
    a, file = artifact, tmp_path / "day.safetensors"
    save_artifact(file, a.manifest, a.model, a.readout, a.mean_rate, a.seen)
    with (
        serving(file) as service,
        Fed(service, shuffled(changed())),
        ServiceClient(service.ingest, timeout=60.0) as client,
        closing(Follower(client, "rat-7", file, policy="automatic", seconds=FITTED)) as follower,
    ):
        (made,) = follower.run(attempts=1, threshold=float("inf"))
        assert made.verdict is Verdict.REFUSED, made
        assert "rows that fit" in made.why
        assert [m.role for m in client.models()] == ["serving"]
    assert list(tmp_path.glob("day*")) == [file]


def test_targets_among_the_bins_become_labels(artifact: Artifact, tmp_path: Path) -> None:
    manifest = msgspec.structs.replace(
        artifact.manifest, kinematic_names=("vx", "vy"), kinematic_units=("m/s", "m/s")
    )
    counts, aims = np.ones((3, 2), np.uint16), np.array([[0, 0, 0, 1, 0.1], [0, 0, 1, 0, 0.1]])
    aims = np.concatenate([aims, np.full((1, 5), np.nan)])
    np.savez(
        tmp_path / "x.npz",
        counts=counts,
        mask=counts > 0,
        names=np.array(["a", "b"]),
        bin_width=0.05,
        decoded=np.tile([3.0, 4.0], (3, 1)),
        aims=aims,
    )
    read = read_streamed(tmp_path / "x.npz", manifest)
    assert read.kinematics is not None
    np.testing.assert_allclose(read.kinematics[:2], [[0, 5], [5, 0]], atol=1e-12)
    assert read.scored.tolist() == [True, True, False]
    assert read_streamed(tmp_path / "x.npz").kinematics is None


def test_what_is_not_bins_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"PK no archive")
    with pytest.raises(RecordingError, match="bins that `follow` wrote"):
        read_streamed(tmp_path / "x.npz")
