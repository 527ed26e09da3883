"""Units that are dead, saturated or drifting are masked, said, and used again once they recover."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from feeder import UNITS, Feeder, bin_, open_
from ilqr_clients.sdk import ServiceClient
from ilqr_service.server import Service
from ilqr_vae.cli import main
from ilqr_vae.protocol import messages
from ilqr_vae.streaming.unit_watch import UnitWatch
from rig import make_model, serving


def watched(counts: np.ndarray, rate: float = 1.0) -> list[UnitWatch]:
    watch, out = UnitWatch.fresh(counts.shape[1]), list[UnitWatch]()
    for row in counts:
        watch = watch.after(row.astype(float), None, np.full(counts.shape[1], rate))
        out.append(watch)
    return out


def test_dead_saturated_and_drifting_units_are_masked_and_come_back() -> None:
    counts = np.random.default_rng(0).poisson(1.0, (3000, 24))
    healthy = watched(counts)
    assert not any(w.masked.any() for w in healthy)
    bad = counts.copy()
    bad[500:1500, 2] = 0
    bad[500:1500, 5] = 60
    bad[500:1500, 9] = np.random.default_rng(1).poisson(4.5, 1000)
    seen = watched(bad)
    names = tuple(f"u{i}" for i in range(24))
    assert seen[1499].flagged(names) == ("u2:dead", "u5:saturated", "u9:drifting")
    assert not seen[499].masked.any()
    assert seen[540].flagged(names)[0] == "u2:dead"
    assert not seen[2999].masked.any()
    changes = [c for a, b in pairwise(seen) for c in b.changes(a, names)]
    assert len(changes) == 6  # each masked once and used again once: no flicker
    most = watched(np.zeros((200, 24), dtype=int))[-1]
    assert most.masked.sum() == 6  # never more than a quarter


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("models")
    model = make_model(folder / "a.safetensors", n_units=7, names=UNITS)
    make_model(folder / "b.safetensors", n_units=7, names=UNITS, seed=1, members=2)
    with serving(model, credits=500, gap_limit=20) as running:
        yield running


def test_a_dead_unit_is_masked_in_a_session_that_asked(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = np.random.default_rng(3).poisson(1.0, (300, 7))
    counts[60:, 4] = 0
    with Feeder(service.ingest, service.results) as feeder:
        for name, watch in (("plain", False), ("watched", True)):
            feeder.subscribe(name)
            feeder.ask(open_(name, watch_units=watch), messages.Opened)
            feeder.send(*(bin_(name, i, row) for i, row in enumerate(counts)))
            notice = None
            results: list[messages.Result] = []
            while len(results) < 300:
                message = feeder.published()
                if isinstance(message, messages.Result):
                    results.append(message)
                elif message.what.startswith("unit"):
                    notice = message.what
            assert (notice == "unit u4 masked: dead") == watch
        infos = {
            i.session: i for i in feeder.ask(messages.Sessions(), messages.SessionList).sessions
        }
        assert infos["watched"].flagged == ("u4:dead",)
        assert infos["plain"].flagged == ()
        assert main(["monitor", "--to", service.ingest, "--once"]) == 0
        assert "masked  u4:dead" in capsys.readouterr().out
        assert main(["monitor", "--to", service.ingest, "--once", "--json", "-"]) == 0
        seen = {s["session"]: s["flagged"] for s in json.loads(capsys.readouterr().out)["sessions"]}
        assert (seen["watched"], seen["plain"]) == (["u4:dead"], [])
        for name in ("plain", "watched"):
            feeder.ask(messages.Close(session=name), messages.Closed)


def test_the_list_of_masked_units_is_the_estimator_s_through_resets_and_swaps(
    service: Service,
) -> None:
    rows = np.random.default_rng(0).poisson(1.0, (400, 7))
    rows[:, 2] = 0
    with (
        Feeder(service.ingest, service.results) as feeder,
        ServiceClient(service.ingest, timeout=60.0) as control,
    ):
        feeder.subscribe("s")
        feeder.ask(open_("s", watch_units=True), messages.Opened)

        def flagged_after(first: int, last: int) -> tuple[str, ...]:
            feeder.send(*(bin_("s", i, rows[i]) for i in range(first, last)))
            feeder.results(last - first)
            (info,) = feeder.ask(messages.Sessions(), messages.SessionList).sessions
            return info.flagged

        assert flagged_after(0, 100) == ("u2:dead",)
        assert flagged_after(200, 205) == ()  # a gap too long: everything begins again
        assert flagged_after(205, 270) == ("u2:dead",)
        control.load("b.safetensors")
        assert flagged_after(270, 275) == ("u2:dead",)  # what is known of units goes along
        assert flagged_after(275, 350) == ("u2:dead",)
