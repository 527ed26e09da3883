"""A session of a journal as NWB: what came, what was answered, by which model, set how."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ilqr_service.journal.export_events import add_events
from ilqr_service.journal.records import (
    Answered,
    Deployed,
    Happened,
    Header,
    Opened,
    Queued,
)
from ilqr_service.journal.verify import stream
from ilqr_service.solving.run import unpack_work
from ilqr_service.work import Swap, Work
from ilqr_vae.errors import RecordingError
from ilqr_vae.progress import SILENT, Progress
from ilqr_vae.protocol import messages
from ilqr_vae.recordings.nwb.write import SubjectInfo, write_whole_nwb

STATUSES = ("none", "ok", "degraded", "late", "missing", "extrapolated")


@dataclass(slots=True)
class Recorded:
    """A run of a journal, with the newest revision of each answer."""

    opened: Opened
    header: Header
    bins: dict[int, Work]
    results: dict[int, messages.Result]
    events: dict[tuple[str, int], messages.Event] = field(
        default_factory=dict[tuple[str, int], messages.Event]
    )

    @property
    def start_ns(self) -> int:
        """When the first answered bin was complete, by the service's clock; where its feeder did
        not state its clock, when it was received."""
        first, request = self.results[min(self.results)], self.opened.request
        if first.clock is None or not first.source_ns:
            return first.received_ns
        at_ns = first.source_ns
        if request.origin_ns is not None:
            at_ns = request.origin_ns + (first.index + 1) * request.bin_width_ns
        return at_ns + first.clock.offset_ns

    def timed_events(self) -> list[tuple[float, messages.Event]]:
        """Events with their times in seconds from the start, rising; an event whose sender did not
        state its clock has the time at which it was received."""
        timed = [
            (e.received_ns if e.clock is None else e.time_ns + e.clock.offset_ns, e)
            for e in self.events.values()
        ]
        return [((at - self.start_ns) / 1e9, e) for at, e in sorted(timed, key=lambda t: t[0])]


def runs_of(
    folder: Path, damage: list[str] | None = None, progress: Progress = SILENT
) -> tuple[list[Recorded], dict[str, Any]]:
    """All runs, oldest first, and the manifests by model id; ``damage`` is given a line for
    everything in the journal that is odd, ``progress`` the segments read. Raises JournalError."""
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
            case Opened() if header is not None:
                runs.setdefault(record.run, Recorded(record, header, {}, {}))
            case Queued():
                run, work = runs.get(record.work.run), record.work
                if run is not None and work.counts is not None:
                    run.bins[work.index] = unpack_work(work)
            case Happened():
                event = record.event
                if record.run in runs:
                    runs[record.run].events.setdefault((event.source, event.index), event)
            case Answered():
                run = runs.get(record.run)
                result = messages.decode_published(record.frame)
                if run is not None and isinstance(result, messages.Result):
                    before = run.results.get(result.index)
                    if before is None or before.revision < result.revision:
                        run.results[result.index] = result
            case _:
                pass
    return list(runs.values()), manifests


def choose(
    runs: list[Recorded], session: str | None, epoch: int | None, run: int | None
) -> Recorded:
    """The only run with answers that fits. Raises RecordingError: none or several."""
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
            f"({len(r.results)} bins from {_started(r):%Y-%m-%d %H:%M:%S} UTC)"
            for r in answered
        )
        raise RecordingError(
            "session",
            expected="a --session, --epoch or --run that names one with answers",
            got=f"{len(fitting)} of: {known or 'none'}",
        )
    return fitting[0]


def _started(run: Recorded) -> datetime:
    header = run.header
    started_ns = header.at_ns + (run.start_ns - header.clock_ns)
    return datetime.fromtimestamp(started_ns / 1e9, UTC)


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
    """Write a run as NWB, whole or not at all. Who was recorded, by whom and where the journal does
    not know; without it nwbinspector finds the file wanting.

    Raises:
        RecordingError: not a .nwb path in an existing folder, it exists and ``force`` is not
            given, it cannot be written, or pynwb is not installed.
    """
    if path.suffix.lower() != ".nwb" or not path.parent.is_dir():
        raise RecordingError("out", expected="NAME.nwb in an existing folder", got=str(path))
    if path.exists() and not force:
        raise RecordingError("out", expected="a new file, or --force", got=f"{path} exists")
    try:
        import pynwb as pynwb_module
    except ModuleNotFoundError as error:
        raise RecordingError("out", expected="pynwb installed", got="none") from error
    pynwb: Any = pynwb_module  # its classes are made at run time
    nwb = _build(pynwb, run, manifests, subject, experimenter, institution)
    write_whole_nwb(pynwb, nwb, path)
    return path


def _build(
    pynwb: Any,
    run: Recorded,
    manifests: dict[str, Any],
    subject: SubjectInfo | None,
    experimenter: str,
    institution: str,
) -> Any:
    request, header = run.opened.request, run.header
    first = run.results[min(run.results)]
    nwb: Any = pynwb.NWBFile(
        session_description=f"session {request.session}, epoch {request.epoch}, decoded live",
        identifier=f"{header.boot}-{run.opened.run}",
        session_start_time=_started(run),
        session_id=f"{request.session}-{request.epoch}",
        keywords=["iLQR-VAE", "decoding"],
        experimenter=[experimenter] if experimenter else None,
        institution=institution or None,
        experiment_description="spike counts streamed to a decoder and its answers",
    )
    if subject is not None:
        known = {key: value for key, value in asdict(subject).items() if value}
        nwb.subject = pynwb.file.Subject(**known)
    # a row for each bin with an answer; time counts from the first of them
    row = {index: k for k, index in enumerate(sorted(run.results))}
    indices = np.array(list(row), dtype=np.int64)
    n_bins, width = len(row), request.bin_width_ns / 1e9
    clock: dict[str, Any] = {"rate": 1 / width, "starting_time": 0.0}
    if indices[-1] - indices[0] >= n_bins:  # after a gap that has no answers
        clock = {"timestamps": (indices - indices[0]) * width}
    counts = np.full((n_bins, len(request.units)), np.nan)
    observed = np.zeros((n_bins, len(request.units)), dtype=np.uint8)
    for index, work in run.bins.items():
        if not isinstance(work, Swap) and work.counts is not None and index in row:
            counts[row[index]] = work.counts
            observed[row[index]] = 1 if work.mask is None else work.mask
    info = manifests.get(first.model, {})
    names = {
        "latent": [f"z{k}" for k in range(first.latent.shape[0])],
        "rates": list(request.units),
        "kinematics": list(info.get("kinematic_names", ())),
    }
    units = {"latent": "n.a.", "rates": "count"}
    kinematic_units = set(info.get("kinematic_units", ()))
    units["kinematics"] = kinematic_units.pop() if len(kinematic_units) == 1 else "n.a."

    def add(module: Any, name: str, data: Any, unit: str, what: str, columns: list[str]) -> None:
        module.add(
            pynwb.TimeSeries(
                name=name,
                data=data,
                unit=unit,
                **clock,
                description=what,
                comments="columns: " + ", ".join(columns) if columns else "one value a bin",
            )
        )

    spikes = nwb.create_processing_module("ecephys", "spikes counted in bins, as they came")
    what = "spikes of each unit (columns) in each bin (rows); NaN where no bin came"
    add(spikes, "binned_spikes", counts, "count", what, list(request.units))
    what = "1 where the feeder observed the unit"
    add(spikes, "observed", observed, "n.a.", what, list(request.units))
    decoder = nwb.create_processing_module(
        "misc", "decoder's answers; of each bin the newest revision"
    )
    for name in messages.VECTORS:
        base = name.removesuffix("_std")
        data = np.full((n_bins, getattr(first, name).shape[0]), np.nan)
        for index, result in run.results.items():
            data[row[index]] = messages.unpack(getattr(result, name), name)
        if data.shape[1]:
            what = "standard deviation" if name != base else "mean"
            add(decoder, name, data, units[base], f"{what} after each bin", names[base])
    scalars = {
        "index": list(run.results),
        "status": [STATUSES.index(r.status) for r in run.results.values()],
        "revision": [r.revision for r in run.results.values()],
        "iterations": [r.iterations for r in run.results.values()],
        "bits": [r.bits for r in run.results.values()],
        "latency_ms": [(r.published_ns - r.received_ns) / 1e6 for r in run.results.values()],
    }
    for name, values in scalars.items():
        data = np.zeros(n_bins)
        data[[row[index] for index in run.results]] = values
        what = f"{name} of each answer"
        if name == "status":
            what += ": " + ", ".join(f"{k} {text}" for k, text in enumerate(STATUSES))
        add(decoder, name, data, "ms" if name == "latency_ms" else "n.a.", what, [])
    add_events(pynwb, nwb, run.timed_events(), indices[-1] * width - indices[0] * width)
    served = sorted({r.model for r in run.results.values()})
    for name, value in {
        "model_manifest": {m: manifests[m] for m in served if m in manifests},
        "service_settings": header.settings,
        "versions": header.versions,
        "open_request": msgspec.structs.asdict(request),
    }.items():
        text = msgspec.json.encode(value).decode()
        nwb.add_scratch(text, name=name, description=f"{name}, JSON")
    return nwb
