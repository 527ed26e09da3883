"""Events of the experiment: taken from whoever may, published, journalled, exported as trials."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np
import pynwb
import pytest
import torch
import zmq
from nwbinspector import inspect_nwbfile
from pynwb import NWBHDF5IO

from ilqr_clients.sdk import ServiceClient, model_of
from ilqr_service.journal.contents import contents_of, look
from ilqr_service.journal.export import choose, runs_of, write
from ilqr_vae.artifact import load_artifact
from ilqr_vae.errors import RequestRefusedError
from ilqr_vae.protocol import messages
from ilqr_vae.recordings.nwb.write import SubjectInfo
from ilqr_vae.report import nwb_events
from rig import make_model, serving
from test_sessions import open_, refused, table


def event(**changes: Any) -> messages.Event:
    return messages.Event(**({"session": "s", "name": "cue", "time_ns": 5} | changes))


def test_an_event_is_published_once_and_acknowledged_each_time() -> None:
    t = table()
    t.receive(b"f", open_(epoch=4), 0)
    effects = t.receive(b"g", event(payload={"x": [1, 2]}, source="task", index=3), 9)
    (published,) = effects.published
    assert isinstance(published, messages.Event)
    assert (published.epoch, published.received_ns, published.bin) == (4, 9, 0)
    assert effects.happened == [(0, published)]
    again = t.receive(b"g", event(source="task", index=3), 12)
    assert again.published == []
    assert [r for _, r in again.replies] == [r for _, r in effects.replies]
    assert messages.topic_of(published) == b"s\x01"


def test_events_are_of_the_sessions_user_or_state_its_token() -> None:
    t = table()
    t.receive(b"f", open_(token="secret"), 0, "rig")
    assert refused(t.receive(b"g", event(), 0, "other")).field == "session"
    assert refused(t.receive(b"g", event(token="wrong"), 0, "other")).field == "session"
    assert refused(t.receive(b"g", event(session="none"), 0, "rig")).field == "session"
    assert t.receive(b"g", event(token="secret"), 0, "other").published
    (published,) = t.receive(b"g", event(index=1), 0, "rig").published
    assert isinstance(published, messages.Event)
    assert published.token == ""
    late = event(index=2, payload={"x": "y" * 70_000})
    assert refused(t.receive(b"g", late, 0, "rig")).field == "payload"
    odd = event(index=2, payload={"x": msgspec.msgpack.Ext(7, b"z")})
    assert refused(t.receive(b"g", odd, 0, "rig")).field == "payload"


def test_events_reach_listeners_and_become_trials_in_an_export(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m.safetensors", n_units=5)
    journal = tmp_path / "journal"
    with serving(model, journal=str(journal)) as service, ServiceClient(service.ingest) as client:
        served = model_of(client.describe())
        everything: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
        everything.connect(service.results)
        everything.setsockopt(zmq.SUBSCRIBE, b"")
        options: dict[str, Any] = {"units": served.unit_names, "bin_width": served.bin_width}
        with client.open("rat", hear_events=True, **options) as session:
            now = session.timer.now_ns()
            for index, counts in enumerate(np.ones((8, 5), np.int64)):
                session.step(index, counts, source_ns=now + index * 50_000_000)
                at = now + index * 50_000_000 + 20_000_000
                if index in (1, 4):
                    target = {"target": [0.1, index], "side": "left", "reach": index}
                    assert client.event("rat", "trial_start", target, time_ns=at).bin == index + 1
                if index == 3:
                    client.event("rat", "trial_stop", {"reward": 1.5}, time_ns=at)
                    crashed = shutil.copytree(journal, tmp_path / "crashed")
            while len(session.events) < 3:
                session.receive(0.1)
            assert [e.name for e in session.events] == ["trial_start", "trial_stop", "trial_start"]
            assert session.events[0].payload == {"target": [0.1, 1], "side": "left", "reach": 1}
            with pytest.raises(RequestRefusedError, match="an open one of this user"):
                client.event("nobody", "cue")
        heard: list[messages.Published | None] = []
        while everything.poll(0):
            heard.append(messages.decode_published(everything.recv_multipart()[-1]))
        assert not any(isinstance(one, messages.Event) for one in heard)
        everything.close(linger=0)
    # a service that takes the session up knows the events it has
    with serving(model, journal=str(crashed)) as service, ServiceClient(service.ingest) as client:
        (again,) = [s for s in service._table if s.name == "rat"]
        assert [number for _, number in again.noted] == [0, 1]
    (run,) = contents_of(journal).runs
    assert run.events == {"trial_start": 2, "trial_stop": 1}
    assert "events: 2 trial_start, 1 trial_stop" in str(look(journal)[1])
    runs, manifests = runs_of(journal)
    who = SubjectInfo("rat", "Rattus norvegicus", "F", "P90D", "a rat")
    out = tmp_path / "out.nwb"
    write(
        out,
        choose(runs, "rat", None, None),
        manifests,
        subject=who,
        experimenter="Doe, Jo",
        institution="Lab",
    )
    with NWBHDF5IO(out, "r") as io:
        nwb: Any = io.read()
        events = nwb.processing["behavior"]["events"].to_dataframe()
        trials = nwb.trials.to_dataframe()
    assert np.allclose(events["timestamp"], [0.07, 0.17, 0.22], atol=1e-6)
    assert list(events["event"]) == ["trial_start", "trial_stop", "trial_start"]
    assert np.allclose(trials["start_time"], [0.07, 0.22], atol=1e-6)
    assert np.allclose(trials["stop_time"], [0.17, 0.35], atol=1e-6)
    assert list(trials["side"]) == ["left", "left"]
    assert [json.loads(t) for t in trials["target"]] == [[0.1, 1], [0.1, 4]]
    assert trials["reward"][0] == 1.5
    assert np.isnan(trials["reward"][1])
    assert [str(m) for m in inspect_nwbfile(nwbfile_path=out) if m.importance.value >= 2] == []


def test_no_payload_keeps_a_file_from_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys that are attributes, arguments or reserved names of the table, or no names of a file."""
    odd = "id name data description colnames columns namespace neurodata_type object_id tags "
    odd += "tags_index start_time timestamp event . .. a/b a:b"
    values = dict(zip(["", "a\0b", "payload", *odd.split()], range(1, 99), strict=False))
    monkeypatch.setattr(nwb_events, "_MOST_COLUMNS", len(values) - 2)
    more = {"x" * 70_000: 1, "text": "a\0b", "raw": b"\xff"}
    payloads = [values, more]
    events = [
        (float(k), event(index=k, name="trial_start", source="a\0", payload=payload))
        for k, payload in enumerate(payloads)
    ]
    nwb: Any = pynwb.NWBFile("made up", "id", datetime(2024, 1, 1, tzinfo=UTC))
    nwb_events.add_events(pynwb, nwb, events, 5.0, 0.1)
    with NWBHDF5IO(tmp_path / "a.nwb", "w") as out:
        out.write(nwb)
    with NWBHDF5IO(tmp_path / "a.nwb", "r") as io:
        read: Any = io.read()
        tables = [read.processing["behavior"]["events"].to_dataframe(), read.trials.to_dataframe()]
    for made, first in zip(tables, (4, 2), strict=True):
        own = made.iloc[0].tolist()[first:]
        rest = json.loads(own.pop())
        assert own == [value for key, value in values.items() if key not in rest]
        assert values == {**values, **rest}
        assert json.loads(made.iloc[1].tolist()[-1]) == {**more, "raw": "/w=="}


def test_details_go_to_those_alone_who_subscribed_to_them() -> None:
    counts = np.array([[1, 0, 2, 0, 3], [0, 1, 0, 65_535, 0]])
    mask = np.array([True, False, True, True, True])
    with TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "m.safetensors", n_units=5)
        with serving(model) as service, ServiceClient(service.ingest) as client:
            served = model_of(client.describe())
            options: dict[str, Any] = {"units": served.unit_names, "bin_width": served.bin_width}
            with client.open("rat", **options) as session:
                session.step(0, counts[0])
                assert service._publisher._last.keys() == {b"rat\x00"}  # nobody asked
            with client.open("rat", hear_details=True, **options) as session:
                for index in range(6):
                    session.step(index, counts[0])
                session.step(7, counts[1], mask=mask)
                while len(session.details) < 8:
                    session.receive(0.1)
                first, *_, fifth, missing, last = session.details
                estimator = load_artifact(model, device="cpu").estimator()
                state, ones = estimator.init(batch=1), torch.ones(1, 5, dtype=torch.float64)
                for _ in range(6):
                    state, _ = estimator.step(state, torch.tensor(counts[:1]).double(), ones)
    assert first.inputs is None
    assert fifth.inputs is not None
    assert last.mask is not None
    np.testing.assert_array_equal(messages.unpack(first.counts, "counts"), counts[0])
    assert (fifth.index, fifth.input_delay) == (5, 4)  # as far back as the window reaches
    np.testing.assert_array_equal(messages.unpack(fifth.inputs, "inputs"), state.u[0, 0])
    assert (missing.index, missing.counts, missing.mask) == (6, None, None)
    np.testing.assert_array_equal(messages.unpack(last.mask, "mask"), mask)
