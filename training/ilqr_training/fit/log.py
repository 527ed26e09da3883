"""The TensorBoard log of a training run."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, BinaryIO

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from ilqr_vae.progress import Progress

# protobuf creates these at import: a type checker cannot see them
_events: Any = event_pb2
_summaries: Any = summary_pb2


class TrainingLog:
    """Write scalars as TensorBoard events, without a thread.

    If the log cannot be written, e.g. on a full disk, warn and continue without one.

    Args:
        folder: folder to write to, created if it does not exist; None for no log.
        first: next step; events of an interrupted run from this step on are discarded.
    """

    def __init__(self, folder: Path | None, first: int, progress: Progress) -> None:
        self._progress, self._file = progress, None
        if folder is None:
            return
        name = f"events.out.tfevents.{time.time():.6f}.{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO | None = (folder / name).open("wb", buffering=0)
        except OSError as error:
            self._end(error)
        self._write(_events.Event(file_version="brain.Event:2"))
        self._mark(_events.SessionLog.START, first)

    def add(self, part: str, values: dict[str, float], step: int) -> None:
        """Log each value as ``part/name``."""
        scalars = [
            _summaries.Summary.Value(tag=f"{part}/{k}", simple_value=v) for k, v in values.items()
        ]
        self._write(_events.Event(step=step, summary=_summaries.Summary(value=scalars)))

    def end(self, step: int) -> None:
        """Mark the end of the run: its model file is written."""
        self._mark(_events.SessionLog.STOP, step)

    def _mark(self, status: int, step: int) -> None:
        self._write(_events.Event(step=step, session_log=_events.SessionLog(status=status)))

    def _write(self, event: Any) -> None:
        if self._file is None:
            return
        event.wall_time = time.time()
        try:
            RecordWriter(self._file).write(event.SerializeToString())
        except OSError as error:
            self._end(error)

    def _end(self, error: OSError) -> None:
        self._progress.log(f"warning: the TensorBoard log ends here: {error}; training goes on")
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
