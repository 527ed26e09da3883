"""Several sessions with different units: shared dynamics, a model file for each session's units.

Inference is optimal control, not a network, so a session needs no read-in: its spikes enter through
its own rows of the likelihood. These rows and the readout belong to a session; dynamics, prior and
initial state are shared.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch

from ilqr_training.config import TrainConfig, with_fraction
from ilqr_training.fit.crops import prepare
from ilqr_training.fit.members import refuse_sessions
from ilqr_training.fit.model_file import manifest_of, save_model
from ilqr_training.fit.train import Trained, train_on
from ilqr_training.fit.validate import validate
from ilqr_vae.artifact import Artifact, Manifest, ModelSpec, build, load_artifact
from ilqr_vae.errors import RecordingError
from ilqr_vae.model.generative import Model
from ilqr_vae.progress import SILENT, Progress
from ilqr_vae.recordings import Recording, load_recording
from ilqr_vae.recordings.joined import SEPARATOR, join


def session_path(out: Path, name: str) -> Path:
    """Return the model file of a session, beside the joint one: ``m-monday.safetensors``."""
    return out.with_name(f"{out.stem}-{name}{out.suffix}")


def load_sessions(config: TrainConfig, recordings: list[Path]) -> dict[str, Recording]:
    """Read the recordings, by session name, and check each as for training.

    Raises:
        RecordingError: two files have the same name, or one cannot be read or trained on.
    """
    names = [path.stem for path in recordings]
    if len(set(names)) < len(names):
        raise RecordingError("--recording", expected="files of different names", got=str(names))
    sessions = {p.stem: load_recording(p, config.data) for p in recordings}
    for recording in sessions.values():  # each session has its own readout
        prepare(recording, config.data, chunk=1)
    return sessions


def train_sessions(
    config: TrainConfig,
    recordings: list[Path],
    out: Path,
    progress: Progress = SILENT,
    *,
    resume: bool = False,
    log_dir: Path | None = None,
) -> tuple[Trained, dict[str, Manifest]]:
    """Train on all sessions together, then write one model file per session.

    Args:
        recordings: two or more files; the name of a session is its file name without suffix.
        out: file of the joint model of all units; for the others see ``session_path``.
        progress, resume, log_dir: as for ``train``.

    Returns:
        The joint run, and the manifest of each session by name.

    Raises:
        RecordingError: two files have the same name, sessions differ in bin width or kinematics, or
            a session has no unit left.
        ConfigError, TrainingError: as for ``train``.
    """
    refuse_sessions(config)
    sessions = load_sessions(config, recordings)
    joined = join(sessions, config.data.split)
    # the split of each session is applied already
    done = train_on(
        with_fraction(config, 1.0),
        joined,
        out,
        progress,
        resume=resume,
        log_dir=log_dir,
        afterwards=len(recordings),
    )
    joint = load_artifact(out)
    made: dict[str, Manifest] = {}
    for name, recording in sessions.items():
        made[name] = _own(config, name, recording, joint, session_path(out, name), done, progress)
    return done, made


def _own(
    config: TrainConfig,
    name: str,
    recording: Recording,
    joint: Artifact,
    out: Path,
    done: Trained,
    progress: Progress,
) -> Manifest:
    """Write the model of one session: its rows, and a readout fitted on its own parts."""
    prefix = name + SEPARATOR
    kept = [i for i, unit in enumerate(joint.manifest.unit_names) if unit.startswith(prefix)]
    if not kept:
        raise RecordingError(
            "data.min_rate", expected=f"a rate that leaves a unit of {name}", got="none left"
        )
    # units were selected for the joint model: do not select again
    chosen = recording.select_units(
        tuple(joint.manifest.unit_names[i].removeprefix(prefix) for i in kept)
    )
    data = prepare(chosen, msgspec.structs.replace(config.data, min_rate=0.0), chunk=1)
    spec = _fewer(joint.manifest.model, len(kept))
    model = restricted(joint.model, spec, kept)
    final = validate(model, data, config, thorough=True, progress=progress)
    manifest = manifest_of(config, data, final, done.steps, done.best_step)
    others = {"trained_with": joint.manifest.model_id, "session": name}
    return save_model(
        out,
        msgspec.structs.replace(
            manifest, model=spec, provenance=manifest.provenance | others, history=done.history
        ),
        model,
        final,
    )


def _fewer(spec: ModelSpec, units: int) -> ModelSpec:
    spikes = msgspec.structs.replace(spec.groups["spikes"], channels=units)
    return msgspec.structs.replace(spec, groups={**spec.groups, "spikes": spikes})


def restricted(model: Model, spec: ModelSpec, units: list[int]) -> Model:
    """Return the model with only the rows of these units; ``spec`` has that many units."""
    made = build(spec).to(model.initial.mean)
    index = torch.as_tensor(units)
    state = {
        name: value[index] if name.startswith("groups.spikes.") else value
        for name, value in model.state_dict().items()
    }
    made.load_state_dict(state)
    return made
