"""Keeps a served model adapted to the stream that it decodes, from outside the service.

It listens to the answers of a session and the counts from which they were inferred. Once a minute
it reports how well the model predicts the counts. When needed it refits the rows of the units by
`ilqr-vae adapt`, in a separate process. A candidate that is not refused runs in the shadow, on the
same bins as the serving model. Only if it predicts these better is it proposed or swapped in,
depending on the policy. Once it serves, the previous model runs in the shadow, and returns if it
predicts better. Each step is a request to the service, so the journal records it and `verify`
reproduces the run.

If the session's events contain cursor and target, the intended velocity can be used as a label: the
decoded speed, in the direction of the target. The readout is then fitted too, and a candidate must
predict the spikes about as well as the serving model instead of better.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zmq
from numpy.typing import NDArray

from ilqr_clients.closed_loop import metres_per_second
from ilqr_clients.connection import model_of, reachable
from ilqr_clients.listener import PATIENCE_S, Topic
from ilqr_clients.sdk import ServiceClient
from ilqr_vae.errors import ConfigError, ServiceError
from ilqr_vae.files import replacing
from ilqr_vae.protocol import messages

Policy = Literal["never", "propose", "automatic"]
_TURN_S = 0.2
_LABELLED = 1 / 3
"""Least share of bins with known targets; with fewer, the fit uses none."""
_AS_WELL = 0.95
"""Least bits of a candidate fitted with targets, as a share of those of the serving model."""


def started_adapt(model: Path, bins: Path, out: Path) -> subprocess.Popen[str]:
    """Start `ilqr-vae adapt` with one thread, on time that no other process wants."""
    command = [sys.executable, "-m", "ilqr_vae.cli", "adapt", str(model)]
    command += ["--recording", str(bins), "--out", str(out), "--threads", "1"]
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )
    with contextlib.suppress(OSError):  # it may have ended, or the system may not know this policy
        if hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, process.pid, 19)
        if hasattr(os, "sched_setscheduler"):
            os.sched_setscheduler(process.pid, os.SCHED_IDLE, os.sched_param(0))
    return process


class Verdict(Enum):
    """How one attempt ended."""

    REFUSED = "refused before it was tried"
    DROPPED = "dropped: it predicts no better than the model that serves"
    PROPOSED = "proposed: it waits in the shadow for `ilqr-vae models swap`"
    SWAPPED = "swapped in"
    ROLLED_BACK = "rolled back: it predicted worse once it served"


@dataclass(frozen=True)
class Attempt:
    """An attempt with a candidate.

    Attributes:
        bits: bits per spike of the serving model and of the candidate on the same bins; None before
            the trial.
        why: the reason that `adapt` gave for a refusal.
    """

    verdict: Verdict
    bits: tuple[float, float] | None = None
    why: str = ""

    def __str__(self) -> str:
        bits = (
            "" if self.bits is None else f" ({self.bits[0]:.3f} and {self.bits[1]:.3f} bits/spike)"
        )
        return self.verdict.value + bits + (f": {self.why}" if self.why else "")


class Follower:
    """Follows a session.

    Args:
        service: connection of a user that may read the session and, except for the policy
            ``never``, control models.
        session: session to follow; its feeder may come and go.
        model: the served file; candidates are written beside it, in the model folder of the
            service.
        policy: what to do with a better candidate.
        seconds: seconds of the stream to fit on.
        trial: seconds of the stream in the shadow.
        targets: whether to use the targets in the session's ``kinematics`` events as labels.
        say: receives a line for each report.

    Raises:
        ConfigError: the file does not exist, a time is not positive, or ``targets`` is set and the
            model decodes no velocities.
    """

    def __init__(
        self,
        service: ServiceClient,
        session: str,
        model: Path,
        *,
        policy: Policy = "propose",
        seconds: float = 90.0,
        trial: float = 30.0,
        targets: bool = False,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        if not model.is_file():
            raise ConfigError("model", expected="the model file that is served", got=str(model))
        if not (seconds > 0 and trial > 0):
            got = f"{seconds:g} and {trial:g}"
            raise ConfigError("--seconds, --trial", expected="positive seconds", got=got)
        described = service.describe()
        self._service, self._session, self._policy, self._say = service, session, policy, say
        self._served = model_of(described)
        self._served.require_counts("follow")
        units = self._served.kinematic_units
        if targets and (len(units) < 2 or None in metres_per_second(units)):
            expected = "a model whose first two channels are velocities"
            raise ConfigError("--targets", expected=expected, got=", ".join(units) or "none")
        width = self._served.bin_width
        self._fit, self._trial = round(seconds / width), max(1, round(trial / width))
        self._minute = max(1, round(60 / width))
        self._model, self._targets = model, targets
        self._decoded: dict[int, NDArray[np.float64]] = {}
        self._aims: dict[int, NDArray[np.float64]] = {}
        self._bins: dict[int, tuple[NDArray[np.uint16], NDArray[np.bool_]] | None] = {}
        self._epoch, self._heard, self._made = -1, 0, 0
        self._context: zmq.Context[Any] = zmq.Context()
        address = reachable(described.results, service.endpoint)
        key, timer = service.key, service.timer
        self._topic = Topic(
            self._context, address, session, key, timer, events=targets, details=True
        )

    def close(self) -> None:
        """Stop listening."""
        self._context.destroy(linger=0)

    @property
    def index(self) -> float:
        """Return the calibration index of the session; NaN if the service does not know it.

        It is the bits per spike over the stream's own mean rates, divided by those on held-out data
        in training.

        Raises:
            ServiceError: the service refuses, or does not answer.
        """
        listed = {info.session: info.calibration for info in self._service.sessions()}
        found = listed.get(self._session)
        return float("nan") if found is None else found

    def listen(self, bins: int, until: Callable[[], bool] = lambda: False) -> int:
        """Receive answers for this many bins, or until ``until`` returns True; return their number.

        Raises:
            ServiceUnreachableError: the service is silent, and does not answer either.
        """
        begun, word = self._heard, time.monotonic()
        while self._heard - begun < bins and not until():
            if self._topic.socket.poll(int(1e3 * _TURN_S)):
                word = time.monotonic()
            elif time.monotonic() - word > PATIENCE_S:
                self._service.describe()
                word = time.monotonic()
            for message, _ in self._topic.take():
                match message:
                    case messages.Detail():
                        self._detail(message)
                    case messages.Result():
                        self._result(message)
                    case messages.Event(name="kinematics"):
                        self._aim(message)
                    case _:
                        pass
        return self._heard - begun

    def _detail(self, detail: messages.Detail) -> None:
        if detail.epoch != self._epoch:  # of another run: do not mix its bins with earlier ones
            self._epoch = detail.epoch
            for kept in (self._bins, self._decoded, self._aims):
                kept.clear()
        if detail.counts is None:
            self._bins[detail.index] = None
        else:
            counts = messages.unpack(detail.counts, "counts")
            mask = np.ones(counts.shape, bool)
            if detail.mask is not None:
                mask = messages.unpack(detail.mask, "mask").astype(bool)
            self._bins[detail.index] = counts.astype(np.uint16), mask
        while len(self._bins) > self._fit:
            del self._bins[min(self._bins)]
        for kept in (self._decoded, self._aims):
            while len(kept) > 2 * self._fit:
                del kept[min(kept)]

    def _aim(self, event: messages.Event) -> None:
        """Keep cursor, target and radius of each bin after a go cue."""
        rows = event.payload.get("rows")
        for row in rows if isinstance(rows, list) and event.epoch == self._epoch else ():
            if not isinstance(row, dict) or not row.get("go"):
                continue
            try:
                at = [*row["cursor"], *row["target"], row.get("radius", 0.0)]
                index, aim = int(row["bin"]), np.array(at, dtype=np.float64)
            except (KeyError, TypeError, ValueError):
                continue
            if aim.shape == (5,) and np.isfinite(aim).all():
                self._aims[index] = aim

    def _result(self, result: messages.Result) -> None:
        if result.revision:
            return
        self._heard += 1
        if self._targets:
            self._decoded[result.index] = messages.unpack(result.kinematics, "kinematics").copy()
        if self._heard % self._minute == 0:
            self._say(f"index {self.index:.2f} (1: as well as on held-out data at training)")

    def write_bins(self, path: Path) -> None:
        """Write the received bins for `ilqr-vae adapt`.

        A unit that the service masked all the time is included: it may be another one, whose row
        can be learnt. If it was also silent, it is missing.
        """
        first, last = min(self._bins), max(self._bins)
        shape = last - first + 1, len(self._served.unit_names)
        counts, mask = np.zeros(shape, np.uint16), np.zeros(shape, bool)
        for index, found in self._bins.items():
            if found is not None:
                counts[index - first], mask[index - first] = found
        came = np.array([self._bins.get(i) is not None for i in range(first, last + 1)])
        strangers = (mask.sum(0) < came.sum() / 2) & (counts.sum(0) > 0)
        mask |= came[:, None] & strangers
        names = np.array(self._served.unit_names)
        labels = self._labels(first, last)
        with replacing(path) as part, part.open("wb") as file:
            width = self._served.bin_width
            np.savez(
                file,
                allow_pickle=False,
                counts=counts,
                mask=mask,
                names=names,
                bin_width=np.array(width),
                **labels,
            )

    def _labels(self, first: int, last: int) -> dict[str, NDArray[Any]]:
        """Return decodes and aims of these bins, NaN if unknown; nothing if too few are known."""
        bins = range(first, last + 1)
        known = sum(i in self._aims and i in self._decoded for i in bins)
        if known < _LABELLED * len(bins):
            if self._targets:
                self._say(
                    f"targets are known in {known} of {len(bins)} bins, too few: fitting without"
                )
            return {}
        width = len(self._served.kinematic_names)
        decoded = [self._decoded.get(i, np.full(width, np.nan)) for i in bins]
        aims = np.array([self._aims.get(i, np.full(5, np.nan)) for i in bins])
        return {"decoded": np.array(decoded), "aims": aims}

    def attempt(self) -> Attempt:
        """Fit, try, and apply the policy. Takes as long as the trial.

        Raises:
            ServiceError: the service refuses, or does not answer.
        """
        self._made += 1
        name = f"{self._model.stem}.adapted-{time.strftime('%Y%m%d-%H%M%S')}-{self._made}"
        made = self._model.with_name(name + self._model.suffix)
        bins = made.with_suffix(".npz")
        self.write_bins(bins)
        try:
            ran = self._adapt(bins, made)
        finally:
            bins.unlink(missing_ok=True)
        if ran.returncode != 0:
            why = (ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"])[-1]
            return Attempt(Verdict.REFUSED, why=why.removeprefix("error: "))
        attempt = self._tried(made)
        if attempt.verdict in (Verdict.DROPPED, Verdict.ROLLED_BACK):
            made.unlink(missing_ok=True)
        elif attempt.verdict is Verdict.SWAPPED:
            self._model = made
        return attempt

    def _adapt(self, bins: Path, made: Path) -> subprocess.CompletedProcess[str]:
        """Run `adapt`, and keep listening meanwhile so that no messages pile up."""
        with started_adapt(self._model, bins, made) as fitting:
            try:
                self.listen(sys.maxsize, until=lambda: fitting.poll() is not None)
            except BaseException:
                fitting.kill()
                raise
            _, errors = fitting.communicate()
        return subprocess.CompletedProcess(fitting.args, fitting.returncode, "", errors)

    @property
    def _least(self) -> float:
        """Least bits of a candidate, as a share of those of the serving model."""
        return _AS_WELL if self._targets else 1.0

    def _tried(self, made: Path) -> Attempt:
        bits = self._beside(made)
        least = self._least * bits[0]
        if not bits[1] > max(least, 0.0):
            self._service.roll_back()
            return Attempt(Verdict.DROPPED, bits)
        if self._policy != "automatic":
            return Attempt(Verdict.PROPOSED, bits)
        self._service.swap()
        after = self._beside(self._model)  # on bins that were not used for the choice
        if self._least * after[1] > after[0]:
            self._service.swap()
            return Attempt(Verdict.ROLLED_BACK, (after[1], after[0]))
        self._service.roll_back()
        return Attempt(Verdict.SWAPPED, bits)

    def _beside(self, file: Path) -> tuple[float, float]:
        """Return bits per spike of the serving model and of this file over the bins of a trial."""
        self._service.load(file.name, shadow=True)
        scores = self._scores("shadow", "serving")
        while scores["shadow"].bins < self._trial:
            self.listen(max(1, self._trial - scores["shadow"].bins))
            scores = self._scores("shadow", "serving")
        return scores["serving"].bits_per_spike, scores["shadow"].bits_per_spike

    def _scores(self, *roles: str) -> dict[str, messages.ModelInfo]:
        found = {info.role: info for info in self._service.models()}
        if missing := [role for role in roles if role not in found]:
            raise ServiceError(
                "models", expected=f"a {missing[0]} one", got="none: somebody else changed them"
            )
        return found

    def run(self, *, attempts: int | None = None, threshold: float = 1.0) -> list[Attempt]:
        """Collect bins, and make an attempt whenever the index is below the threshold.

        Args:
            attempts: stop after this many attempts; None for no limit.
            threshold: threshold of the index; infinite for an attempt each time.
        """
        made: list[Attempt] = []
        while attempts is None or len(made) < attempts:
            self.listen(max(self._fit - len(self._bins), 0) or self._trial)
            below = not self.index > threshold
            if len(self._bins) < self._fit or self._policy == "never" or not below:
                continue
            made.append(self.attempt())
            self._say(str(made[-1]))
            if made[-1].verdict is Verdict.PROPOSED:
                break
            if made[-1].verdict is not Verdict.SWAPPED:
                self._bins.clear()  # do not retry on the data that has just failed
        return made
