"""A count that no unit can have costs that unit that bin; the stream goes on."""

from __future__ import annotations

import numpy as np

from feeder import UNITS, Feeder, bin_, numbers, open_, spikes
from ilqr_clients.answer import Answer
from ilqr_service.server import Service
from ilqr_vae.protocol import messages
from ilqr_vae.protocol.messages import MAX_COUNT

N_BINS, AT, UNIT = 40, 20, 3


def streamed(feeder: Feeder, session: str, counts: np.ndarray, **changes: object) -> list:
    feeder.subscribe(session)
    feeder.ask(open_(session), messages.Opened)
    feeder.send(
        *(bin_(session, i, x, **(changes if i == AT else {})) for i, x in enumerate(counts))
    )
    return feeder.results(N_BINS)


def test_an_absurd_count_is_a_unit_not_observed(feeder: Feeder, service: Service) -> None:
    counts = spikes(N_BINS)
    absurd = counts.copy()
    absurd[AT, UNIT] = MAX_COUNT
    mask = messages.pack(np.arange(len(UNITS)) != UNIT, "u1")
    masked = streamed(feeder, "masked", counts, mask=mask)
    ignored = streamed(feeder, "absurd", absurd)
    for one, other in zip(masked, ignored, strict=True):
        np.testing.assert_array_equal(numbers(one), numbers(other))
        assert one.status == other.status
    assert [r.ignored for r in ignored] == [
        (UNITS[UNIT],) if i == AT else () for i in range(N_BINS)
    ]
    assert Answer.of(ignored[AT], 0).ignored == (UNITS[UNIT],)
    assert all(not r.ignored for r in masked)


def test_it_is_told_once_for_as_long_as_it_lasts(feeder: Feeder, service: Service) -> None:
    counts = spikes(N_BINS)
    counts[AT : AT + 5, UNIT] = MAX_COUNT
    feeder.subscribe("told")
    feeder.ask(open_("told"), messages.Opened)
    feeder.send(*(bin_("told", i, x) for i, x in enumerate(counts)))
    notices: list[str] = []
    while True:
        message = feeder.published()
        if isinstance(message, messages.Notice):
            notices.append(message.what)
        elif message.index == N_BINS - 1:
            break
    why = "its count is beyond the model's limit"
    assert [n for n in notices if "ignored" in n] == [
        f"unit {UNITS[UNIT]} ignored from bin {AT}: {why}"
    ]


def test_a_bin_of_absurd_counts_alone_is_a_prediction(feeder: Feeder, service: Service) -> None:
    counts = spikes(N_BINS)
    counts[AT] = MAX_COUNT
    results = streamed(feeder, "all", counts)
    assert results[AT].status == "extrapolated"
    assert results[AT].ignored == UNITS
    assert {r.status for r in results if r.index != AT} == {"ok"}
