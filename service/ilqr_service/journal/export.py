"""Export of a session from a journal as NWB: bins, answers, the model and the settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ilqr_service.journal.records import (
    Answered,
    Deployed,
    Happened,
    Header,
    Queued,
    RunOpened,
)
from ilqr_service.journal.verify import stream
from ilqr_service.solving.run import unpack_work
from ilqr_service.work import SwapModel, Work
from ilqr_vae.errors import RecordingError, number_of
from ilqr_vae.progress import SILENT, Progress
from ilqr_vae.protocol import messages
from ilqr_vae.recordings.nwb.write import SubjectInfo
from ilqr_vae.report.decoded import About, Decoded, check_out, write_decoded


@dataclass(slots=True)
class Recorded:
    """A run in a journal, with the newest revision of each answer."""

    opened: RunOpened
    header: Header
    decoded: Decoded
    bins: dict[int, Work] = field(default_factory=dict[int, Work])

    @classmethod
    def of(cls, opened: RunOpened, header: Header) -> Recorded:
        """Start a run."""
        request = opened.request
        decoded = Decoded(
            session=request.session,
            epoch=request.epoch,
            identifier=f"{header.boot}-{opened.run}",
            units=request.units,
            bin_width_ns=request.bin_width_ns,
            at_ns=header.at_ns,
            clock_ns=header.clock_ns,
            manifests=header.manifests,
            origin_ns=request.origin_ns,
            texts={
                "service_settings": header.settings,
                "versions": header.versions,
                "open_request": msgspec.structs.asdict(request),
            },
        )
        return cls(opened, header, decoded)

    @property
    def results(self) -> dict[int, messages.Result]:
        """The newest answer to each bin."""
        return self.decoded.results


def runs_of(
    folder: Path, damage: list[str] | None = None, progress: Progress = SILENT
) -> tuple[list[Recorded], dict[str, Any]]:
    """Return all runs, oldest first, and the manifests by model id.

    ``damage`` receives a line for each irregularity, ``progress`` the number of segments read.
    Raises JournalError.
    """
    runs: dict[int, Recorded] = {}
    manifests: dict[str, Any] = {}
    header: Header | None = None
    for record in stream(folder, damage, progress):
        match record:
            case Header():
                header = record
                manifests |= record.manifests
            case Deployed():
                manifests[record.model] = record.manifest
            case RunOpened() if header is not None:
                runs.setdefault(record.run, Recorded.of(record, header))
            case Queued():
                run, work = runs.get(record.work.run), record.work
                if run is not None and work.counts is not None:
                    run.bins[work.index] = unpack_work(work)
            case Happened():
                if record.run in runs:
                    runs[record.run].decoded.add(record.event)
            case Answered():
                run = runs.get(record.run)
                result = messages.decode_published(record.frame)
                if run is not None and isinstance(result, messages.Result):
                    run.decoded.add(result)
            case _:
                pass
    return list(runs.values()), manifests


def choose(
    runs: list[Recorded], session: str | None, epoch: int | None, run: int | None
) -> Recorded:
    """Return the only matching run with answers. Raises RecordingError if none or several match."""
    answered = [r for r in runs if r.results]
    fitting = [
        r
        for r in answered
        if (session is None or r.opened.request.session == session)
        and (epoch is None or r.opened.request.epoch == epoch)
        and (run is None or r.opened.run == run)
    ]
    if len(fitting) != 1:
        known = "; ".join(
            f"{r.opened.request.session}, epoch {r.opened.request.epoch}, run {r.opened.run} "
            f"({number_of(len(r.results), 'bin')} from {r.decoded.started:%Y-%m-%d %H:%M:%S} UTC)"
            for r in answered
        )
        raise RecordingError(
            "session",
            expected="a --session, --epoch or --run that names one with answers",
            got=f"{len(fitting)} of: {known or 'none'}",
        )
    return fitting[0]


def write(
    path: Path,
    run: Recorded,
    manifests: dict[str, Any],
    *,
    subject: SubjectInfo | None = None,
    experimenter: str = "",
    institution: str = "",
    force: bool = False,
) -> Path:
    """Write a run as NWB, atomically.

    Subject, experimenter and institution are not in the journal; nwbinspector reports them as
    missing.

    Raises:
        RecordingError: the path is not a .nwb file in an existing folder, it exists and ``force``
            is not given, it cannot be written, or pynwb is not installed.
    """
    check_out(path, force=force)
    run.decoded.manifests = manifests
    run.decoded.bins = {
        index: (work.counts, work.mask)
        for index, work in run.bins.items()
        if not isinstance(work, SwapModel) and work.counts is not None
    }
    write_decoded(path, run.decoded, About(subject, experimenter, institution))
    return path
