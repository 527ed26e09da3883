"""A journal copied to a second node: who goes on from the copy knows all that anybody has seen."""

from __future__ import annotations

from pathlib import Path

from feeder import Feeder, bin_, open_, spikes
from ilqr_service.fleet.replica import Copier, Store
from ilqr_service.journal.records import Answered
from ilqr_service.journal.verify import stream, verify
from ilqr_vae.protocol import messages
from ilqr_vae.protocol.keys import make_server_key
from rig import serving, until

BEHIND = "ilqr_journal_copy_behind_bytes"


def answered(folder: Path) -> list[int]:
    return sorted({r.index for r in stream(folder) if isinstance(r, Answered)})


def test_nothing_is_told_that_the_copy_has_not(model_file: Path, tmp_path: Path) -> None:
    key = make_server_key(tmp_path / "keys")
    live, copy = tmp_path / "live", tmp_path / "copy"
    bins = [bin_("s", i, x) for i, x in enumerate(spikes(30))]
    store = Store("127.0.0.1", b"the fleet's", key)
    copier, stranger = Copier("a", b"the fleet's", key), Copier("a", b"another's", key)
    store.hold("a", copy)
    try:
        with (
            serving(model_file, journal=str(live), snapshot_every=8, copy=copier) as service,
            Feeder(service.ingest, service.results) as feeder,
        ):
            feeder.subscribe("s")
            feeder.ask(open_("s"), messages.Opened)
            feeder.send(*bins[:10])
            feeder.results(10)  # without a copy nothing is held
            copier.aim(store.address)
            until("in step", lambda: copier.in_step == store.address)
            feeder.send(*bins[10:20])
            feeder.results(10)
            assert answered(copy) == list(range(20))
            service.telemetry.registry.register(copier)
            assert service.telemetry.registry.get_sample_value(BEHIND) == 0
            store.release("a")
            feeder.send(*bins[20:25])
            until("answered", lambda: answered(live) == list(range(25)))
            feeder.ask(messages.Probe(client_ns=0), messages.Probed)  # it is alive
            assert not feeder.sub.poll(0)
            sizes = [[(d / p.name).stat().st_size for p in copy.iterdir()] for d in (live, copy)]
            behind = service.telemetry.registry.get_sample_value(BEHIND)
            assert behind == sum(sizes[0]) - sum(sizes[1]) > 0
            with (
                serving(model_file, journal=str(copy)) as heir,
                Feeder(heir.ingest, heir.results) as other,
            ):
                other.subscribe("s")
                asked = open_("s", resume=True, begin=False, answered=19)
                assert other.ask(asked, messages.Opened).next_index == 20
                other.send(*bins[20:])
                told = other.results(10)
                assert [(r.index, r.revision) for r in told] == [(i, 0) for i in range(20, 30)]
                assert not feeder.sub.poll(0)
            copier.aim("")  # there is no other
            assert [r.index for r in feeder.results(5)] == list(range(20, 25))
        stranger.aim(store.address)
        assert stranger.renewed()
        stranger.write(1, 0, b"no journal")
        for folder in (live, copy):
            verdict = verify(folder, [model_file])
            assert verdict.answers == verdict.identical > 0
            assert not verdict.damaged
    finally:
        for end in (copier, stranger, store):
            end.close()


def test_a_copy_begins_anew_after_a_lost_piece_and_says_what_fails(tmp_path: Path) -> None:
    store, copier = Store("127.0.0.1", b"x", None), Copier("a", b"x", None)
    store.hold("a", tmp_path)
    try:
        copier.aim(store.address)
        assert copier.renewed()
        copier.write(1, 5, b"the middle of a file")
        until("refused", copier.renewed)
        assert not copier.in_step
        copier.write(2, 0, b"all")
        until("copied", lambda: copier.copied() == copier.position)
        assert copier.in_step
        assert (tmp_path / "00000002.journal").read_bytes() == b"all"
        (tmp_path / "gone").mkdir()
        store.hold("a", tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        copier.write(3, 0, b"nowhere")
        until("failing", lambda: "a" in store.failing)
        assert copier.copied() < copier.position
        store.release("a")
        assert not store.failing
    finally:
        copier.close()
        store.close()
