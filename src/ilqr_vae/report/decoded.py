"""A decoded session as NWB: answers, counts if known, events and trials."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ilqr_vae.errors import RecordingError
from ilqr_vae.protocol import messages
from ilqr_vae.recordings.checks import missing_extra
from ilqr_vae.recordings.nwb.write import SubjectInfo, write_whole_nwb
from ilqr_vae.report.nwb_events import add_events

STATUSES = ("none", "ok", "degraded", "late", "missing", "extrapolated")


@dataclass(frozen=True, slots=True)
class About:
    """Metadata that a service does not know; nwbinspector reports them if missing.

    Attributes:
        subject: the subject.
        experimenter: the experimenter, as Last, First.
        institution: the institution.
    """

    subject: SubjectInfo | None = None
    experimenter: str = ""
    institution: str = ""


@dataclass(slots=True, kw_only=True)
class Decoded:
    """A run of a session, with the newest revision of each answer.

    Attributes:
        session, epoch: name and epoch of the session.
        identifier: identifier of the file.
        units: N names.
        bin_width_ns: bin width.
        at_ns, clock_ns: time in ns of the Unix epoch, and of the service's clock.
        manifests: manifests of the models by id.
        origin_ns: start of bin 0 by the feeder's clock, for a spike session.
        results: results by index.
        events: events by source and number.
        bins: (N,) counts, features last, and (N,) mask of each received bin; None if not known.
        texts: further data by name, written as JSON.
    """

    session: str
    epoch: int
    identifier: str
    units: tuple[str, ...]
    bin_width_ns: int
    at_ns: int
    clock_ns: int
    manifests: Mapping[str, Any]
    origin_ns: int | None = None
    results: dict[int, messages.Result] = field(default_factory=dict[int, messages.Result])
    events: dict[tuple[str, int], messages.Event] = field(
        default_factory=dict[tuple[str, int], messages.Event]
    )
    bins: Mapping[int, tuple[NDArray[Any], NDArray[Any] | None]] | None = None
    texts: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def add(self, message: messages.Result | messages.Event) -> None:
        """Add an event, or an answer if it is newer than the one of its bin."""
        if isinstance(message, messages.Event):
            self.events.setdefault((message.source, message.index), message)
            return
        before = self.results.get(message.index)
        if before is None or before.revision < message.revision:
            self.results[message.index] = message

    @property
    def start_ns(self) -> int:
        """When the first answered bin was complete, by the service's clock.

        If its feeder did not state its clock, when it was received.
        """
        first = self.results[min(self.results)]
        if first.clock is None or not first.source_ns:
            return first.received_ns
        at_ns = first.source_ns
        if self.origin_ns is not None:
            at_ns = self.origin_ns + (first.index + 1) * self.bin_width_ns
        return at_ns + first.clock.offset_ns

    @property
    def started(self) -> datetime:
        """``start_ns`` as a date."""
        started_ns = self.at_ns + (self.start_ns - self.clock_ns)
        return datetime.fromtimestamp(started_ns / 1e9, UTC)

    def timed_events(self) -> list[tuple[float, messages.Event]]:
        """Return events with increasing times in seconds from the start.

        An event whose sender did not state its clock has the time of its arrival.
        """
        timed = [
            (e.received_ns if e.clock is None else e.time_ns + e.clock.offset_ns, e)
            for e in self.events.values()
        ]
        return [((at - self.start_ns) / 1e9, e) for at, e in sorted(timed, key=lambda t: t[0])]


def check_out(path: Path, *, force: bool = False) -> None:
    """Check that an NWB file can be written to a path. Raises RecordingError."""
    if path.suffix.lower() != ".nwb" or not path.parent.is_dir():
        raise RecordingError("out", expected="NAME.nwb in an existing folder", got=str(path))
    if path.exists() and not force:
        raise RecordingError("out", expected="a new file, or --force", got=f"{path} exists")


def write_decoded(path: Path, decoded: Decoded, about: About) -> None:
    """Write a run with at least one answer as NWB, atomically; replaces a file.

    Raises:
        ConfigError: the file could not be written.
        RecordingError: pynwb is not installed.
    """
    try:
        import pynwb as pynwb_module
    except ModuleNotFoundError as error:
        raise missing_extra("out", "pynwb", "nwb") from error
    pynwb: Any = pynwb_module  # its classes are created at run time
    nwb: Any = pynwb.NWBFile(
        session_description=f"session {decoded.session}, epoch {decoded.epoch}, decoded live",
        identifier=decoded.identifier,
        session_start_time=decoded.started,
        session_id=f"{decoded.session}-{decoded.epoch}",
        keywords=["iLQR-VAE", "decoding"],
        experimenter=[about.experimenter] if about.experimenter else None,
        institution=about.institution or None,
        experiment_description="spike counts streamed to a decoder and its answers",
    )
    if about.subject is not None:
        known = {key: value for key, value in asdict(about.subject).items() if value}
        nwb.subject = pynwb.file.Subject(**known)
    # a row for each answered bin; time counts from the first
    indices = np.array(sorted(decoded.results), dtype=np.int64)
    width = decoded.bin_width_ns / 1e9
    clock: dict[str, Any] = {"rate": 1 / width, "starting_time": 0.0}
    if indices[-1] - indices[0] >= len(indices):  # after a gap without answers
        clock = {"timestamps": (indices - indices[0]) * width}

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

    if decoded.bins is not None:
        units = list(decoded.units)
        values, observed = _fed(decoded.bins, indices, len(units))
        info = decoded.manifests.get(decoded.results[int(indices[0])].model, {})
        features = list(info.get("features", ()))
        units = units[: len(units) - len(features)]
        counts, values = np.split(values, [len(units)], axis=1)
        observed, known = np.split(observed, [len(units)], axis=1)
        spikes = nwb.create_processing_module("ecephys", "spikes counted in bins, as they came")
        what = "spikes of each unit (columns) in each bin (rows); NaN where no bin came"
        add(spikes, "binned_spikes", counts, "count", what, units)
        add(spikes, "observed", observed, "n.a.", "1 where the feeder observed the unit", units)
        if features:
            what = "features (columns) of each bin (rows), as they came; NaN where not observed"
            add(spikes, "features", np.where(known, values, np.nan), "n.a.", what, features)
    _add_answers(nwb, add, decoded, indices)
    add_events(pynwb, nwb, decoded.timed_events(), (indices[-1] - indices[0]) * width, width)
    served = sorted({r.model for r in decoded.results.values()})
    manifests = {m: decoded.manifests[m] for m in served if m in decoded.manifests}
    for name, value in ({"model_manifest": manifests} | dict(decoded.texts)).items():
        text = msgspec.json.encode(value).decode()
        nwb.add_scratch(text, name=name, description=f"{name}, JSON")
    write_whole_nwb(pynwb, nwb, path)


def _fed(
    bins: Mapping[int, tuple[NDArray[Any], NDArray[Any] | None]],
    indices: NDArray[np.int64],
    n_units: int,
) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """Return counts (T, N), NaN for missing bins, and which were observed (T, N)."""
    counts = np.full((len(indices), n_units), np.nan)
    observed = np.zeros((len(indices), n_units), dtype=np.uint8)
    for row, index in enumerate(indices.tolist()):
        if index in bins:
            counts[row], mask = bins[index]
            observed[row] = 1 if mask is None else mask
    return counts, observed


def _add_answers(nwb: Any, add: Any, decoded: Decoded, indices: NDArray[np.int64]) -> None:
    results = [decoded.results[index] for index in indices.tolist()]
    first = results[0]
    info = decoded.manifests.get(first.model, {})
    names = {
        "latent": [f"z{k}" for k in range(first.latent.shape[0])],
        "rates": list(decoded.units),
        "kinematics": list(info.get("kinematic_names", ())),
        "classes": list(info.get("classes", ())),
    }
    units = {"latent": "n.a.", "rates": "count", "classes": "n.a."}
    kinematic_units = set(info.get("kinematic_units", ()))
    units["kinematics"] = kinematic_units.pop() if len(kinematic_units) == 1 else "n.a."
    module = nwb.create_processing_module(
        "misc", "decoder's answers; of each bin the newest revision"
    )
    for name in (*messages.VECTORS, "classes"):
        base = name.removesuffix("_std")
        if getattr(first, name) is None or not (size := getattr(first, name).shape[0]):
            continue
        data = np.full((len(results), size), np.nan)
        for row, result in enumerate(results):
            values = messages.unpack(getattr(result, name), name)
            data[row, : len(values)] = values[:size]  # a model that was swapped in may have others
        what = "standard deviation" if name != base else "mean"
        if name == "classes":
            what = "probability of each class"
        add(module, name, data, units[base], f"{what} after each bin", names[base])
    scalars: dict[str, list[float]] = {
        "index": [r.index for r in results],
        "status": [STATUSES.index(r.status) for r in results],
        "revision": [r.revision for r in results],
        "iterations": [r.iterations for r in results],
        "bits": [r.bits for r in results],
        "latency_ms": [(r.published_ns - r.received_ns) / 1e6 for r in results],
    }
    if named := names["classes"]:
        chosen = [named.index(r.class_name) if r.class_name in named else -1 for r in results]
        scalars["class"] = list(map(float, chosen))
    for name, values in scalars.items():
        what = f"{name} of each answer"
        if name == "class":
            what += ", its column of classes; -1 where the answer names none"
        if name == "status":
            what += ": " + ", ".join(f"{k} {text}" for k, text in enumerate(STATUSES))
        unit = "ms" if name == "latency_ms" else "n.a."
        add(module, name, np.array(values, np.float64), unit, what, [])
