"""One ``Recording`` type, and the readers and writers that make it from files.

>>> recording = load_recording(path, spec)      # doctest: +SKIP
"""

from ilqr_vae.recordings.spec import MatSpec, NwbSpec, RecordingSpec, SplitSpec
from ilqr_vae.recordings.types import Recording, Trials

__all__ = ["MatSpec", "NwbSpec", "Recording", "RecordingSpec", "SplitSpec", "Trials"]
