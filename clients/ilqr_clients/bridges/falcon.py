"""A decoder for the FALCON benchmark (``reset``, ``predict``, ``observe``, ``on_done``).

It has the methods of ``falcon_challenge.interface.BCIDecoder`` without requiring that package. Each
row of a batch is a session of a running service.

>>> decoder = FalconDecoder("tcp://127.0.0.1:5555", batch_size=2)       # doctest: +SKIP
>>> decoder.reset(["session-1", "session-2"])                           # doctest: +SKIP
>>> decoder.predict(counts)                                             # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ilqr_clients.connection import Closing, model_of
from ilqr_clients.sdk import ServiceClient
from ilqr_clients.session import Session
from ilqr_vae.errors import AnswerTimeoutError, ShapeError


class FalconDecoder(Closing):
    """Decodes batches of bins, a session of the service for each row.

    Args:
        endpoint: the service's address.
        channels: names of the columns of a batch, among which are the model's units; default: the
            model's units in their order.
        batch_size: B.
        session: prefix of the session names.
        restart_trials: whether to restart the estimate of a row when its trial is done.
        timeout: seconds to wait for an answer.
        options: options of ``ServiceClient.open``.

    Raises:
        ServiceError: the service cannot be reached.
        ShapeError: a unit of the model is not among the channels.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        channels: Sequence[str] | None = None,
        batch_size: int = 1,
        session: str = "falcon",
        restart_trials: bool = False,
        timeout: float = 10.0,
        **options: Any,
    ) -> None:
        self.batch_size = batch_size
        self._restart_trials, self._timeout = restart_trials, timeout
        self._name, self._options = session, options
        self._client = ServiceClient(endpoint)
        self._rows: list[Session] = []
        self._next: list[int] = []
        with ExitStack() as undo:
            undo.callback(self._client.close)
            self._model = model_of(self._client.describe())
            self._model.require_counts("a FALCON decoder")
            named = self._model.unit_names if channels is None else channels
            place = {name: k for k, name in enumerate(named)}
            absent = [name for name in self._model.unit_names if name not in place]
            if absent:
                raise ShapeError("channels", expected=f"all units, {absent[0]!r}", got=str(named))
            self._columns = [place[name] for name in self._model.unit_names]
            self._channels = len(named)
            undo.pop_all()

    def close(self) -> None:
        """End the sessions."""
        for row in self._rows:
            row.close()
        self._client.close()

    def set_batch_size(self, batch_size: int) -> None:
        """Set the number of rows from the next ``reset`` on."""
        self.batch_size = batch_size

    def reset(self, dataset_tags: Sequence[str] = ("",)) -> None:
        """Restart for new data. Raises ServiceError."""
        for row in self._rows:
            row.close()
        self._rows = [self._open(k) for k in range(self.batch_size)]
        self._next = [0] * self.batch_size

    def _open(self, row: int) -> Session:
        model = self._model
        options: dict[str, Any] = {"units": model.unit_names, "bin_width": model.bin_width}
        return self._client.open(f"{self._name}-{row}", **(options | self._options))

    def predict(self, neural_observations: ArrayLike) -> NDArray[np.float64]:
        """Decode one bin of each row.

        Args:
            neural_observations: (B, C) spike counts; NaN if not observed.

        Returns:
            (B, D) decoded kinematics, in the model's ``kinematic_units``.

        Raises:
            ShapeError: the shape is not (B, C), or the values are not counts.
            ServiceError: a bin was not answered.
        """
        if not self._rows:
            self.reset()
        batch = np.asarray(neural_observations, np.float64)
        if batch.shape != (len(self._rows), self._channels):
            expected = f"({len(self._rows)}, {self._channels})"
            raise ShapeError("neural_observations", expected=expected, got=str(batch.shape))
        counts = batch[:, self._columns]
        observed = np.isfinite(counts)
        for k, row in enumerate(self._rows):
            row.send(self._next[k], np.where(observed[k], counts[k], 0), mask=observed[k])
        decoded: list[NDArray[np.float64]] = []
        for k, row in enumerate(self._rows):
            decoded.append(self._answer(row, self._next[k]))
            self._next[k] += 1
        return np.stack(decoded)

    def _answer(self, row: Session, index: int) -> NDArray[np.float64]:
        while True:
            answers = row.receive(self._timeout)
            for answer in answers:
                if answer.index == index:
                    return answer.kinematics
            if not answers:
                raise AnswerTimeoutError(
                    f"session {row.request.session!r}",
                    expected=f"an answer for bin {index} within {self._timeout:g} s",
                    got="none",
                )

    def observe(self, neural_observations: ArrayLike) -> None:
        """Add bins without returning predictions."""
        self.predict(neural_observations)

    def on_done(self, dones: ArrayLike) -> None:
        """Restart the estimates of rows whose trial is done, if configured."""
        if not self._restart_trials:
            return
        for k in np.flatnonzero(np.asarray(dones, bool)).tolist():
            self._rows[k].close()
            self._rows[k], self._next[k] = self._open(k), 0
