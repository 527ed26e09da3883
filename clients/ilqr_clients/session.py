"""One stream of bins and their answers."""

from __future__ import annotations

import time
from typing import SupportsIndex

import numpy as np
from numpy.typing import ArrayLike

from ilqr_clients.answer import Answer
from ilqr_clients.channel import TURN_S, Channel
from ilqr_clients.channel import OnError as OnError
from ilqr_clients.connection import refusal
from ilqr_clients.exact import finite, packed_counts, packed_features, packed_mask, whole
from ilqr_clients.outstanding import REMEMBERED
from ilqr_vae.errors import AnswerTimeoutError, ServiceUnreachableError
from ilqr_vae.protocol import messages


class Session(Channel):
    """A stream of bins and its answers, created by ``ServiceClient.open``.

    ``step`` sends a bin and returns its answer; ``send`` and ``receive`` do it without waiting for
    each. Arguments, attributes and errors are those of ``Channel``.
    """

    def send(
        self,
        index: SupportsIndex,
        counts: ArrayLike,
        *,
        features: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        source_ns: SupportsIndex | None = None,
    ) -> int:
        """Send a bin without blocking.

        Args:
            index: index of the bin, increasing from 0; a skipped index is a missing bin.
            counts: (N,) spike counts, integers in [0, 65535]; or (N + F,), with the features last.
            features: (F,) values of ``opened.features``, in the recording's units, NaN where not
                observed; None means that none is.
            mask: bool (N + F,), True where the unit or feature was observed; None means all.
            source_ns: when the bin was complete, or was to be sent, by this client's clock;
                default: now. It must not decrease with the index.

        Returns:
            When it was passed to the socket, in ns of this client's clock.

        Raises:
            ShapeError: the index or a count is not an integer in its range, there is not one count
                (or mask) per unit, the features are not the model's, or the mask is not boolean.
            RequestRefusedError: an earlier bin was refused (see ``refused``); this one is not sent.
            SessionEndedError: the session is not open any more.
            ServiceUnreachableError, AnswerTimeoutError: no answer for ``patience`` seconds.
        """
        self._take(0.0)
        self._report(sending=True)
        return self._send(index, counts, features, mask, source_ns)

    def _send(
        self,
        index: SupportsIndex,
        counts: ArrayLike,
        features: ArrayLike | None,
        mask: ArrayLike | None,
        source_ns: SupportsIndex | None,
    ) -> int:
        number = whole("index", index)
        channels, continuous = len(self.request.units), len(self.opened.features or ())
        if features is None and continuous and np.shape(counts) == (channels,):
            counts, features = np.split(np.asarray(counts), [channels - continuous])
        packed = packed_counts(counts, channels - continuous)
        now = self.timer.now_ns()
        source = now if source_ns is None else whole("source_ns", source_ns, -(2**63))
        message = messages.Bin(
            session=self.request.session,
            epoch=self.request.epoch,
            index=number,
            source_ns=source,
            counts=packed,
            features=None if features is None else packed_features(features, continuous),
            mask=packed_mask(mask, channels),
            clock=self.clock.stated(now),
            token=self.request.token,
        )
        if (probe := self.clock.probe(now)) is not None:
            self.send_raw(messages.encode(probe))
        frame = messages.encode(message)
        self.send_raw(frame)
        self._outstanding.sent(number, frame, time.monotonic())
        self.credits -= 1
        return now

    def step(
        self,
        index: SupportsIndex,
        counts: ArrayLike,
        timeout: float | None = None,
        *,
        features: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        source_ns: SupportsIndex | None = None,
    ) -> Answer:
        """Send a bin and return its answer. Other answers are kept for ``receive``.

        A further call for a bin that was not answered in time only waits again.

        Args:
            index, counts, features, mask, source_ns: as for ``send``.
            timeout: seconds to wait; default: ``patience``.

        Raises:
            RequestRefusedError: the bin was refused; the field says why.
            AnswerTimeoutError: no answer within ``timeout``.
            ServiceUnreachableError: no answer within ``timeout``, and no connection to the service.
            SessionEndedError: the session is not open any more.
        """
        number = whole("index", index)
        limit = self.patience if timeout is None else finite("timeout", timeout)
        self._take(0.0)
        self._check()
        earlier, end = len(self.refused), time.monotonic() + limit
        if number not in self._outstanding and all(a.index != number for a in self._ready):
            self._send(number, counts, features, mask, source_ns)
        while True:
            for k, answer in enumerate(self._ready):
                if answer.index == number:
                    del self._ready[: max(0, k - REMEMBERED)]
                    return self._ready.pop(min(k, REMEMBERED))
            for refused in self.refused[earlier:]:
                if refused.index == number:
                    self._refusals = [r for r in self._refusals if r is not refused]
                    raise refusal(self.endpoint, refused)
            self._check(raise_ended=True)
            if (left := end - time.monotonic()) <= 0:
                lost = not self._watched.connected
                raise (ServiceUnreachableError if lost else AnswerTimeoutError)(
                    self._where,
                    expected=f"an answer for bin {number} within {limit:g} s",
                    got="no connection (is the service running?)" if lost else "none",
                )
            self._take(min(left, TURN_S))
