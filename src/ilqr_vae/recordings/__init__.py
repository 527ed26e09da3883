"""One ``Recording`` type, and the readers and writers that make it from files.

>>> recording = load_recording(path, spec)      # doctest: +SKIP
"""

from ilqr_vae.recordings.load import load_matching, load_recording
from ilqr_vae.recordings.nwb_write import BehaviourSeries, SubjectInfo, TrialTable, write_nwb
from ilqr_vae.recordings.spec import MatSpec, NwbSpec, RecordingSpec, SplitSpec
from ilqr_vae.recordings.types import Recording, Trials

__all__ = [
    "BehaviourSeries",
    "MatSpec",
    "NwbSpec",
    "Recording",
    "RecordingSpec",
    "SplitSpec",
    "SubjectInfo",
    "TrialTable",
    "Trials",
    "load_matching",
    "load_recording",
    "write_nwb",
]
