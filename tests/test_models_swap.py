"""Models: load, shadow, swap and roll back under load; refusals that change nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from feeder import UNITS, WAIT_S, Feeder, bin_, numbers, open_, spikes
from ilqr_clients.sdk import ServiceClient
from ilqr_service.journal.verify import verify
from ilqr_service.sessions.effects import Effects
from ilqr_service.sessions.session import Limits
from ilqr_service.sessions.table import SessionTable
from ilqr_service.settings import ServiceSettings
from ilqr_service.solving import engine as engine_module
from ilqr_service.solving import slots as slots_module
from ilqr_service.solving import warm_up as warm_up_module
from ilqr_service.solving.engine import Engine
from ilqr_service.solving.engines import Engines, Shadow
from ilqr_service.solving.slots import Slots
from ilqr_service.work import NO_SOLVE, Solve
from ilqr_vae.artifact import load_artifact
from ilqr_vae.errors import JournalError, ProtocolError, ServiceError
from ilqr_vae.protocol import messages
from ilqr_vae.streaming.unit_watch import UnitWatch
from process import Served, metrics, offline, served
from rig import make_model, serving

pytestmark = pytest.mark.chaos


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "a.safetensors", n_units=7, names=UNITS)
    make_model(folder / "b.safetensors", n_units=7, names=UNITS, seed=1, members=2)
    make_model(folder / "units.safetensors", n_units=7, names=tuple(reversed(UNITS)), seed=2)
    make_model(folder / "width.safetensors", n_units=7, names=UNITS, seed=3, bin_width=0.02)
    make_model(folder / "same.safetensors", n_units=7, names=tuple(reversed(UNITS)))
    scaled = folder / "scaled.safetensors"
    make_model(scaled, n_units=7, names=UNITS, seed=4, kinematic_unit="mm/s")
    (folder / "bad.safetensors").write_bytes((folder / "a.safetensors").read_bytes()[:-9])
    return folder


@pytest.fixture(scope="module")
def service(
    models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Served, Path]]:
    """A process of its own, and its journal."""
    folder = tmp_path_factory.mktemp("service")
    (folder / "s.toml").write_text("credits = 500\nkeep_warm_ms = 0.0\ncontrol_rate = 1e9\n")
    options = ("--config", str(folder / "s.toml"), "--journal", str(folder / "journal"))
    with served(models / "a.safetensors", folder / "log", *options) as running:
        yield running, folder / "journal"
        assert running.stop() == 0


def test_swap_under_load_loses_no_bin_and_a_refused_file_changes_nothing(
    service: tuple[Served, Path], models: Path
) -> None:
    running, journal = service
    counts = spikes(120)
    a, b = str(running.ready["model"]), ""
    results: list[messages.Result] = []
    with (
        Feeder(running.ingest, running.results) as feeder,
        ServiceClient(running.ingest, timeout=60.0) as control,
    ):
        feeder.subscribe("s")
        feeder.ask(open_("s"), messages.Opened)

        def feed(first: int, last: int) -> None:
            feeder.send(*(bin_("s", i, counts[i]) for i in range(first, last)))
            # taken by the time this is answered: control comes by another connection
            feeder.ask(messages.Probe(client_ns=0), messages.Probed)

        feed(0, 20)
        (models / "loop.safetensors").symlink_to("loop.safetensors")
        for name, said in (
            ("bad.safetensors", "model file bad"),
            ("units.safetensors", "unit_names"),
            ("width.safetensors", "bin_width"),
            ("scaled.safetensors", "kinematic_units"),
            ("same.safetensors", "unit_names"),  # the same weights, for other units
            ("a.safetensors", "model"),
            ("absent.safetensors", "path"),
            ("../a.safetensors", "path"),
            ("a\0.safetensors", "path"),
            ("a" * 300, "path"),
            ("loop.safetensors", "path"),
        ):
            with pytest.raises(ServiceError, match=said):
                control.load(name)
        feed(20, 40)
        control.load("b.safetensors", shadow=True)
        feed(40, 80)
        results += feeder.results(80)
        (serving_, shadow) = control.models()
        assert (serving_.role, serving_.model, shadow.role) == ("serving", a, "shadow")
        b = shadow.model
        assert 0 < shadow.bins == serving_.bins <= 40
        assert shadow.bits_per_spike != serving_.bits_per_spike
        feed(80, 100)
        control.swap()  # behind what is queued
        feed(100, 110)
        assert [m.role for m in control.roll_back()] == ["serving", "before"]
        feed(110, 120)
        results += feeder.results(40)
        feeder.ask(messages.Close(session="s"), messages.Closed)
    assert [r.index for r in results] == list(range(120))
    assert {r.status for r in results} == {"ok"}
    at = [r.model for r in results]
    assert at == [a] * 100 + [b] * 10 + [a] * 10
    everything = np.ones(counts.shape, dtype=bool)
    expected = offline(models / "a.safetensors", counts, everything)
    for r in results[:100]:
        np.testing.assert_array_equal(numbers(r), expected[r.index])
    # the other model begins from the window's bins
    expected = offline(models / "b.safetensors", counts[95:], everything[95:])
    for r in results[100:110]:
        np.testing.assert_array_equal(numbers(r), expected[r.index - 95])
    counted = metrics(running)
    assert counted["ilqr_swapped_total"] == 2
    assert counted["ilqr_load_failed_total"] == 6
    files = [models / f"{name}.safetensors" for name in "ab"]
    verdict = verify(journal, files)
    assert verdict.answers == verdict.identical == 120
    for given in files:  # b is named by swaps alone, in no run's beginning
        with pytest.raises(JournalError, match=f"files of {b if given is files[0] else a} too"):
            verify(journal, [given])


def test_slots_serve_models_side_by_side(models: Path) -> None:
    """Of other units, and of another bin width."""
    extra = {"other": models / "units.safetensors", "quick": models / "width.safetensors"}
    with (
        serving(models / "a.safetensors", extra=extra) as running,
        Feeder(running.ingest, running.results) as feeder,
    ):
        feeder.subscribe("a")
        feeder.subscribe("b")
        first = feeder.ask(open_("a"), messages.Opened)
        second = feeder.ask(open_("b", model="other", units=UNITS[::-1]), messages.Opened)
        assert first.model != second.model
        assert feeder.ask(open_("c", model="other"), messages.Refused).field == "units[0]"
        counts = spikes(1)[0]
        feeder.send(bin_("a", 0, counts), bin_("b", 0, counts))
        by_session = {r.session: r.model for r in feeder.results(2)}
        assert by_session == {"a": first.model, "b": second.model}
        quick = open_("q", model="quick", bin_width_ns=20_000_000)
        assert feeder.ask(open_("q", model="quick"), messages.Refused).field == "bin_width_ns"
        feeder.subscribe("q")
        third = feeder.ask(quick, messages.Opened)
        rows = spikes(12)
        feeder.send(*(bin_("q", i, row) for i, row in enumerate(rows)))
        everything = np.ones(rows.shape, dtype=bool)
        expected = offline(models / "width.safetensors", rows, everything)
        for r, e in zip(feeder.results(12), expected, strict=True):
            assert r.model == third.model
            np.testing.assert_array_equal(numbers(r), e)


@pytest.mark.parametrize("shadow", [True, False])
def test_loading_a_model_that_another_slot_serves_takes_nothing_from_its_sessions(
    models: Path, shadow: bool
) -> None:
    rows = spikes(20)
    everything = np.ones(rows.shape, dtype=bool)
    with (
        serving(models / "a.safetensors", extra={"other": models / "b.safetensors"}) as running,
        Feeder(running.ingest, running.results) as feeder,
        ServiceClient(running.ingest, timeout=60.0) as control,
    ):
        feeder.subscribe("s")
        feeder.ask(open_("s", model="other"), messages.Opened)
        feeder.send(*(bin_("s", i, row) for i, row in enumerate(rows[:10])))
        results = feeder.results(10)
        control.load("b.safetensors", slot="main", shadow=shadow)
        feeder.send(*(bin_("s", 10 + i, row) for i, row in enumerate(rows[10:])))
        results += feeder.results(10)
    for r, e in zip(results, offline(models / "b.safetensors", rows, everything), strict=True):
        np.testing.assert_array_equal(numbers(r), e)


def test_a_model_that_came_to_be_served_while_it_was_loading_is_refused(models: Path) -> None:
    options = ServiceSettings(device="cpu")
    first = Engine.load(models / "a.safetensors", options)
    engines, table = Engines(first), SessionTable(first.model_info, Limits(deadline_ns=1))
    slots = Slots({"main": first}, engines, table, options, models)

    def done() -> Effects:
        for thread in threading.enumerate():
            if thread.name == "load":
                thread.join(60)
        return slots.loaded()

    slots.load(b"me", messages.Load(path="b.safetensors"))
    done()
    serving_b = slots.slots["main"].serving
    slots.rollback(b"me", messages.Rollback())
    slots.load(b"me", messages.Load(path="b.safetensors", shadow=True))
    slots.rollback(b"me", messages.Rollback())  # which serves it
    (_, reply), *_ = done().replies
    assert isinstance(reply, messages.Refused)
    assert reply.field == "model"
    slot = slots.slots["main"]
    assert slot.serving is serving_b is engines.engines[serving_b.model_info.model]
    assert slot.shadow is None
    assert not engines.shadows


def test_a_load_that_does_not_end_frees_its_slot(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, now, go_on = ServiceSettings(device="cpu"), 0.0, threading.Event()
    first = Engine.load(models / "a.safetensors", options)
    table = SessionTable(first.model_info, Limits(deadline_ns=1))
    slots = Slots({"main": first}, Engines(first), table, options, models, clock=lambda: now)
    monkeypatch.setattr(slots_module, "warm_up", lambda _: go_on.wait(60))
    for _ in range(2):
        slots.load(b"me", messages.Load(path="b.safetensors"))
        assert not slots.loaded().replies
        now += 1000.0
        ((_, reply),) = slots.loaded().replies
        assert isinstance(reply, messages.Refused)
        assert "loads in" in reply.expected
    with pytest.raises(ProtocolError, match="at most 2 loads at once"):  # both threads go on
        slots.load(b"me", messages.Load(path="b.safetensors"))
    go_on.set()
    for thread in threading.enumerate():
        if thread.name == "load":
            thread.join(60)
    assert not slots.loaded().replies  # what came too late is not used
    assert slots.slots["main"].serving is first
    slots.load(b"me", messages.Load(path="b.safetensors"))


def test_a_model_too_slow_or_too_large_to_serve_is_refused_by_name(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.load(models / "a.safetensors", ServiceSettings(device="cpu", horizon=300))
    monkeypatch.setattr(warm_up_module, "_LONGEST_S", 0.0)
    with pytest.raises(ServiceError, match="model: expected a window of 300 bins that fills"):
        warm_up_module.warm_up(engine)
    monkeypatch.setattr(engine_module, "available_memory", lambda: 1 << 20)
    with pytest.raises(ServiceError, match="model: expected one whose run takes at most 0 MB"):
        Engine.load(models / "a.safetensors", ServiceSettings(device="cpu", horizon=300))


def test_compiling_is_not_held_against_a_model(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps with a solve and without are compiled each at its first call, for a minute or more."""
    compiled: set[int] = set()
    took_ns = 0
    options = ServiceSettings(device="cpu")
    artifact = load_artifact(models / "a.safetensors", device="cpu")
    engine = Engine(artifact, options, clock=lambda: time.monotonic_ns() + took_ns)
    given = engine._stepper._given

    def compiling(works: list[Solve], watches: list[UnitWatch | None]) -> object:
        nonlocal took_ns
        if works[0].budget not in compiled:
            compiled.add(works[0].budget)
            took_ns += 60_000_000_000
        return given(works, watches)

    monkeypatch.setattr(engine._stepper, "_given", compiling)
    assert warm_up_module.warm_up(engine).steps > engine.model_info.horizon
    assert compiled == {0, NO_SOLVE}


def test_a_session_that_runs_on_its_slots_shadow_already_is_left_alone(models: Path) -> None:
    """As after a restart, where its slot serves the model that it was started with again."""
    options = ServiceSettings(device="cpu")
    first, other, alone = (Engine.load(models / f"{n}.safetensors", options) for n in "abb")
    engines = Engines(first)
    engines.engines[other.model_info.model] = other
    engines.shadows["main"] = Shadow(other)
    for i, row in enumerate(spikes(12)):
        work = Solve(
            run=0,
            index=i,
            serial=i,
            counts=row.astype(float),
            restart=i == 0,
            slot="main",
            model=other.model_info.model,
        )
        (answer,), (expected,) = engines.solve([work]), alone.solve([work])
        engines.between()
        np.testing.assert_array_equal(answer.latent, expected.latent)
    assert [w.index for w in other.window(0)] == [w.index for w in alone.window(0)]
    table = SessionTable(first.model_info, Limits(deadline_ns=1))
    table.receive(b"me", open_("s"), 0)
    assert table.swap("main", other.model_info).work
    assert not table.swap("main", other.model_info).work


def test_slots_that_serve_one_model_have_a_shadow_and_a_score_each(models: Path) -> None:
    rows = spikes(12)
    extra = {"other": models / "a.safetensors"}
    with (
        serving(models / "a.safetensors", extra=extra) as running,
        Feeder(running.ingest, running.results) as feeder,
        ServiceClient(running.ingest, timeout=60.0) as control,
    ):
        for name in ("main", "other"):
            feeder.subscribe(name)
            feeder.ask(open_(name, model=name), messages.Opened)
        control.load("b.safetensors", slot="main", shadow=True)
        for name in ("other", "main"):
            feeder.send(*(bin_(name, i, row) for i, row in enumerate(rows)))
            feeder.results(12)

        def scores() -> dict[tuple[str, str], int]:
            models = feeder.ask(messages.Models(), messages.ModelList).models
            return {(m.slot, m.role): m.bins for m in models}

        end = time.monotonic() + WAIT_S
        while scores()["main", "shadow"] < 12 and time.monotonic() < end:
            pass
        expected = {("main", "serving"): 12, ("main", "shadow"): 12, ("other", "serving"): 0}
        assert scores() == expected
