"""``ilqr-vae simulate``: a simulated reaching session, written as NWB."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ilqr_training.options import JsonFile
from ilqr_vae.errors import RecordingError, number_of
from ilqr_vae.files import check_writable, write_whole
from ilqr_vae.progress import Bar
from ilqr_vae.recordings import BehaviourSeries, SubjectInfo, TrialTable, write_nwb
from ilqr_vae.recordings.checks import missing_extra
from ilqr_vae.simulated.subject import RESOLUTION, TICK, SimulatedSession, simulate_session
from ilqr_vae.terminal import console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_SYNTHETIC = "http://purl.obolibrary.org/obo/NCBITaxon_32630"
"""NCBI's taxon "synthetic construct"."""

_EXAMPLE = "Example: ilqr-vae simulate --out session.nwb --seed 7 --minutes 10"


@app.command(epilog=_EXAMPLE)
def simulate(
    out: Annotated[Path, typer.Option(help="The NWB file to write.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of tuning, task and noise.")] = 0,
    minutes: Annotated[float, typer.Option(help="Length of the session, in minutes.")] = 10.0,
    units: Annotated[int, typer.Option(min=1, help="Number of units.")] = 120,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Simulate a reaching session (eight targets, Poisson units, hand kinematics) as NWB."""
    if out.suffix.lower() != ".nwb":
        raise RecordingError("out", expected="a name ending in .nwb", got=out.name)
    if out.exists() and not force:
        raise RecordingError("out", expected="a new file, or --force", got=f"{out} exists")
    check_writable(out, "--out")
    check_writable(json_file, "--json")
    if find_spec("pynwb") is None:
        raise missing_extra("--out", "pynwb", "nwb")
    with Bar() as bar:
        session = simulate_session(seed, minutes=minutes, units=units, progress=bar)
        bar("writing", 0, 1)
        write_session(out, session, force=force)
    summary = summarise(out, session)
    if json_file is not None:
        write_whole(json_file, json.dumps(summary, indent=2) + "\n")
    console(stderr=True).print(
        f"{out}: {summary['minutes']:g} min, {number_of(summary['units'], 'unit')} at "
        f"{summary['rate_hz_median']:.1f} Hz (median), {number_of(summary['trials'], 'reach')}"
    )


def write_session(path: Path, session: SimulatedSession, *, force: bool = False) -> Path:
    """Write a simulated session as NWB. Raises RecordingError, see ``write_nwb``."""
    trials = session.trials
    return write_nwb(
        path,
        session.spike_times,
        unit_names=session.unit_names,
        series=(
            BehaviourSeries(
                name="hand_velocity",
                values=session.velocity,
                unit="m/s",
                rate=1.0 / TICK,
                channels=("vx", "vy"),
                description="velocity of the hand",
            ),
            BehaviourSeries(
                name="hand_position",
                values=session.position,
                unit="meters",
                rate=1.0 / TICK,
                channels=("x", "y"),
                description="position of the hand",
                position=True,
            ),
        ),
        trials=TrialTable(
            start=[t.start for t in trials],
            stop=[t.stop for t in trials],
            columns={
                "condition": [f"target{t.target_index}" for t in trials],
                "target_x": [t.target[0] for t in trials],
                "target_y": [t.target[1] for t in trials],
                "target_on_time": [t.target_on for t in trials],
                "go_time": [t.go for t in trials],
                "acquired_time": [t.acquired for t in trials],
                "success": [t.success for t in trials],
            },
            descriptions={
                "condition": "which of the eight targets",
                "target_x": "metres to the right of the centre",
                "target_y": "metres beyond the centre",
                "target_on_time": "seconds: the target appears",
                "go_time": "seconds: it may be reached",
                "acquired_time": "seconds: entered for good, NaN after a failure",
                "success": "reached in time",
            },
        ),
        subject=SubjectInfo(
            subject_id=f"simulated-{session.seed}",
            species=_SYNTHETIC,
            age="P0D",
            description="simulated by a program; no animal",
        ),
        resolution=RESOLUTION,
        description=f"Simulated centre-out reaching, seed {session.seed}; no animal, no recording.",
        force=force,
    )


def summarise(path: Path, session: SimulatedSession) -> dict[str, Any]:
    """Return a summary of the session, ready for JSON."""
    return {
        "file": str(path),
        "seed": session.seed,
        "minutes": session.duration / 60,
        "units": len(session.unit_names),
        "spikes": sum(len(t) for t in session.spike_times),
        "rate_hz_median": float(np.median(session.rates)),
        "rate_hz_lowest": float(session.rates.min()),
        "rate_hz_highest": float(session.rates.max()),
        "trials": len(session.trials),
        "successes": sum(t.success for t in session.trials),
    }
