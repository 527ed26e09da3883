"""One ``Recording`` type, and the readers and writers that make it from files.

>>> recording = load_recording(path, spec)      # doctest: +SKIP
"""

from ilqr_vae.recordings.load import load_at, load_matching, load_recording
from ilqr_vae.recordings.nwb.write import BehaviourSeries, SubjectInfo, TrialTable, write_nwb
from ilqr_vae.recordings.recording import Recording, RecordingWarning, Trials
from ilqr_vae.recordings.spec import ClockSpec, Hdf5Spec, MatSpec, NwbSpec, RecordingSpec, TrialSpec
from ilqr_vae.recordings.split import SplitSpec

__all__ = [
    "BehaviourSeries",
    "ClockSpec",
    "Hdf5Spec",
    "MatSpec",
    "NwbSpec",
    "Recording",
    "RecordingSpec",
    "RecordingWarning",
    "SplitSpec",
    "SubjectInfo",
    "TrialSpec",
    "TrialTable",
    "Trials",
    "load_at",
    "load_matching",
    "load_recording",
    "write_nwb",
]
