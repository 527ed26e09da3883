"""The time left that a training told, against what it then took.

    python -m benchmarks.time_left model-log [another-log ...]

Reads the TensorBoard events of a run that has ended; they lie beside the model file, or where
``train --log-dir`` says. Time counts from the first gradient step to the written model file.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto import event_pb2

SHARES = (0.25, 0.5, 0.75)

_MARKS: Any = event_pb2.SessionLog  # made by protobuf when imported


@dataclass(frozen=True)
class Told:
    """What was told at one time.

    Attributes:
        at: for people.
        told, took: seconds.
    """

    at: str
    told: float
    took: float

    @property
    def ratio(self) -> float:
        """What it took, over what was told."""
        return self.took / self.told


def told(folder: Path) -> list[Told]:
    """What the newest run in a folder told, at quarters of its steps and of its time.

    Raises:
        ValueError: no run there has ended, or it told nothing.
    """
    files = sorted(folder.glob("events.out.tfevents.*"))
    events: list[Any] = list(LegacyEventFileLoader(str(files[-1])).Load()) if files else []
    began = [e.wall_time for e in events if e.session_log.status == _MARKS.START]
    ended = [e for e in events if e.session_log.status == _MARKS.STOP]
    said = [
        (event.step, event.wall_time, value.simple_value)
        for event in events
        for value in event.summary.value
        if value.tag == "time/left"
    ]
    if not ended or not said:
        raise ValueError(f"{folder}: expected the log of a run that has ended")
    steps, end = ended[-1].step, ended[-1].wall_time
    began_at, span = began[0], end - began[0]

    def first(at: str, later: list[tuple[int, float, float]]) -> list[Told]:
        return [Told(at, seconds, end - time) for _, time, seconds in later[:1]]

    made: list[Told] = []
    for share in SHARES:
        of_steps = [x for x in said if x[0] >= share * steps]
        made += first(f"{100 * share:g} % of the steps", of_steps)
    for share in SHARES:
        of_time = [x for x in said if x[1] >= began_at + share * span]
        made += first(f"{100 * share:g} % of the time", of_time)
    return made


def main(folders: list[str]) -> int:
    """Print a table for each folder."""
    if not folders:
        print(__doc__)
        return 2
    for folder in folders:
        try:
            found = told(Path(folder))
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"{folder}\n{'at':>18}  {'told':>8}  {'took':>8}  took / told")
        for one in found:
            print(f"{one.at:>18}  {one.told:6.1f} s  {one.took:6.1f} s  {one.ratio:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
