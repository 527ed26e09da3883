"""Everything at once for a long time: four sessions, three models, and one mishap after another.

What is random is drawn from a seed. CHAOS=full makes hundreds of mishaps, which takes four or more
minutes; SOAK_ROUNDS and SOAK_SEED take other numbers.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from feeder import UNITS, bin_
from forwarder import Forwarder
from ilqr_clients.answer import Answer
from ilqr_clients.sdk import ServiceClient, Session
from ilqr_service.journal.records import Answered, RunOpened, records, segments
from ilqr_service.journal.verify import numbers, verify
from ilqr_vae.errors import RequestRefusedError, ServiceError
from ilqr_vae.protocol import messages
from process import Served, free_port, offline, served
from rig import BIN_S, make_model

pytestmark = pytest.mark.chaos
FULL = os.environ.get("CHAOS") == "full"
ROUNDS = int(os.environ.get("SOAK_ROUNDS", "220" if FULL else "6"))
SEED = int(os.environ.get("SOAK_SEED", "0"))
PATIENCE_S = 120.0
MOST_WAITING = 200
DAY_NS = 86_400_000_000_000


def computed(a: Answer) -> NDArray[np.float64]:
    vectors = (a.latent, a.latent_std, a.rates, a.kinematics, a.kinematics_std)
    return np.concatenate([*vectors, [a.bits, a.spikes, a.iterations]])


@dataclass
class Stream:
    """A session, and what its feeder sent and got.

    Attributes:
        tidy: bins are sent in order, each once.
        counts, masks: of each index, as sent.
        late: indices that are to be sent later.
        answers: what was computed, by index and revision.
    """

    name: str
    options: dict[str, Any]
    tidy: bool
    rng: np.random.Generator
    session: Session | None = None
    next: int = 0
    counts: list[NDArray[np.int64]] = field(default_factory=list[NDArray[np.int64]])
    masks: list[NDArray[np.bool_]] = field(default_factory=list[NDArray[np.bool_]])
    stamps: list[int] = field(default_factory=list[int])
    late: list[int] = field(default_factory=list[int])
    answers: dict[tuple[int, int], NDArray[np.float64]] = field(
        default_factory=dict[tuple[int, int], NDArray[np.float64]]
    )
    newest: int = -1
    notices: list[str] = field(default_factory=list[str])
    refused: Counter[str] = field(default_factory=Counter[str])

    @property
    def open(self) -> Session:
        assert self.session is not None
        return self.session

    def begin(self, client: ServiceClient) -> None:
        """Open, or go on as another feeder where the session stands."""
        first = self.session is None
        if not first:
            self.leave()
        self.session = client.open(
            self.name,
            units=UNITS,
            bin_width=BIN_S,
            resume=not first,
            answered=self.newest,
            patience=PATIENCE_S,
            on_error=self.went_wrong,
            **self.options,
        )
        assert self.session.opened.resumed is not first
        self.late.clear()
        self.next = self.session.opened.next_index
        # after a pause of its feeder a clocked session goes back
        assert self.next > self.newest or "clocked" in self.options

    @staticmethod
    def went_wrong(error: ServiceError) -> None:
        """Refusals of bins are expected; they are on the session."""
        if not isinstance(error, RequestRefusedError):
            raise error

    def leave(self) -> None:
        self.notices += self.open.notices
        self.refused.update(refused.field for refused in self.open.refused)
        self.open.abandon()

    def draw(self) -> None:
        """What the bins up to ``next`` are, as far as that is not known."""
        while len(self.counts) <= self.next:
            counts = self.rng.poisson(1.0, len(UNITS))
            mask, odd = np.ones(len(UNITS), dtype=bool), self.rng.random()
            if odd < 0.01:
                counts[self.rng.integers(len(UNITS))] = messages.MAX_COUNT
            elif odd < 0.03:
                mask = self.rng.random(len(UNITS)) < 0.5
            elif odd < 0.04:
                mask[:] = False
            self.counts.append(counts)
            self.masks.append(mask)
            self.stamps.append(time.monotonic_ns() + (DAY_NS if odd > 0.995 else 0))

    def send(self, index: int) -> None:
        mask, source_ns = self.masks[index], self.stamps[index]
        self.open.send(index, self.counts[index], mask=mask, source_ns=source_ns)

    def feed(self) -> None:
        """Send the next bin, or not yet, or not at all, and things that are no bins."""
        self.draw()
        index, odd = self.next, self.rng.random()
        self.next += 1
        if odd < 0.03 and not self.tidy:
            pass
        elif odd < 0.1 and not self.tidy:
            self.late.append(index)
        else:
            self.send(index)
            if odd > 0.98:
                self.nonsense(index, int(300 * (1 - odd)))
        while self.late and self.late[0] < self.next - self.rng.integers(1, 6):
            self.send(self.late.pop(0))

    def nonsense(self, index: int, which: int) -> None:
        """Something that is refused, and costs nothing else."""
        ahead, row = index + 100_000, self.counts[index]
        own = {"epoch": self.open.request.epoch, "token": self.open.request.token}
        nonsense = [
            b"nonsense",
            messages.encode(bin_(self.name, index, row, **own)),
            messages.encode(bin_(self.name, ahead, row, **own)),
            messages.encode(bin_(self.name, self.next, row[:-1], **own)),
            messages.encode(bin_(self.name, index, row)),  # without the token
            messages.encode(bin_("nobody", index, row)),
        ]
        self.open.send_raw(nonsense[which])

    def take(self, timeout: float = 0.0) -> None:
        for answer in self.open.receive(timeout):
            key, values = (answer.index, answer.revision), computed(answer)
            np.testing.assert_array_equal(self.answers.setdefault(key, values), values)
            self.newest = max(self.newest, answer.index)


class Soak:
    """A service, its sessions, and what can happen to them."""

    def __init__(self, folder: Path) -> None:
        self.rng = np.random.default_rng(SEED)
        self.folder, self.port = folder, free_port()
        self.models = [folder / f"{name}.safetensors" for name in "abc"]
        for seed, path in enumerate(self.models):
            make_model(path, n_units=7, names=UNITS, seed=seed, horizon=10)
        settings = "credits = 1000\ngap_limit = 2000\nsnapshot_every = 20\n"
        (folder / "s.toml").write_text(settings + "journal_segment_mb = 0.3\n")
        generators = [np.random.default_rng((SEED, k)) for k in range(4)]
        steady = {"deadline": 60.0, "model": "steady"}
        self.streams = [
            Stream("tidy", steady, True, generators[0]),
            Stream("untidy", steady, False, generators[1]),
            Stream("swapped", {"deadline": 60.0, "watch_units": True}, False, generators[2]),
            Stream("clocked", {"clocked": True, "anytime": True}, True, generators[3]),
        ]
        self.happened: Counter[str] = Counter()
        self.forwarder = Forwarder(f"tcp://127.0.0.1:{self.port}")
        self.running: Served | None = None
        self._serving: Any = None
        self._clock = 0.0
        self.start()
        with self.client() as client:
            for stream in self.streams:
                stream.begin(client)

    def start(self) -> None:
        options = ["--journal", str(self.folder / "journal"), "--config"]
        options += [str(self.folder / "s.toml")]
        for name, path in (("steady", self.models[1]), ("spare", self.models[2])):
            options += ["--slot", f"{name}={path}"]
        log = self.folder / "log"
        self._serving = served(self.models[0], log, *options, port=self.port)
        self.running = self._serving.__enter__()

    @property
    def service(self) -> Served:
        assert self.running is not None
        return self.running

    def client(self) -> ServiceClient:
        return ServiceClient(self.forwarder.address, timeout=PATIENCE_S)

    def close(self) -> None:
        for stream in self.streams:
            if stream.session is not None:
                stream.open.abandon()
        self.forwarder.close()
        self._serving.__exit__(None, None, None)

    # ---- what happens --------------------------------------------------------------------------

    def feed(self, bins: int) -> None:
        """So many bins of each session; of the clocked one as many as its time has come for."""
        goals = [stream.next + bins for stream in self.streams[:-1]]
        clocked, end = self.streams[-1], time.monotonic() + PATIENCE_S
        while any(s.next < g for s, g in zip(self.streams, goals, strict=False)):
            assert time.monotonic() < end, "no progress"
            for stream, goal in zip(self.streams, goals, strict=False):
                if stream.next < goal and stream.next - stream.newest < MOST_WAITING:
                    stream.feed()
            if time.monotonic() > self._clock:
                self._clock = max(self._clock + BIN_S, time.monotonic() - 1.0)
                clocked.feed()
            for stream in self.streams:
                stream.take()
            if all(s.next - s.newest >= MOST_WAITING for s in self.streams[:-1]):
                self.streams[0].take(0.05)

    def happen(self, what: str) -> None:
        self.happened[what] += 1
        getattr(self, f"_{what}")()

    def _kill(self) -> None:
        self._serving.__exit__(None, None, None)
        self.start()

    def _blip(self) -> None:
        # none where one came a moment ago and no client has connected again
        self.happened["connections cut"] += self.forwarder.cut()

    def _pause(self) -> None:
        end = time.monotonic() + self.rng.uniform(0.1, 2.0)
        while (left := end - time.monotonic()) > 0:
            self.streams[0].take(min(left, 0.05))

    def _stop(self) -> None:
        self.service.process.send_signal(signal.SIGSTOP)
        time.sleep(self.rng.uniform(0.05, 1.5))  # the fault itself: nothing runs for so long
        self.service.process.send_signal(signal.SIGCONT)

    def _feeder(self) -> None:
        """Another feeder goes on with a session."""
        with self.client() as client:
            self.streams[self.rng.integers(len(self.streams))].begin(client)

    def _swap(self) -> None:
        """Another model in the first slot, as it is loaded or as a shadow; or the one before."""
        with self.client() as client:
            way = self.rng.random()
            try:
                if way < 0.3:
                    client.roll_back()
                    return
                path = self.models[self.rng.integers(len(self.models))].name
                client.load(path, shadow=way < 0.6)
                if way < 0.6:
                    client.swap()
            except RequestRefusedError:  # it is what is served, or nothing was before
                self.happened["swap refused"] += 1

    def settle(self) -> None:
        """Send what is late, then bins in order, and wait for their answers."""
        for stream in self.streams:
            while stream.late:
                stream.send(stream.late.pop(0))
            for _ in range(12):
                stream.draw()
                stream.send(stream.next)
                stream.next += 1
        end = time.monotonic() + PATIENCE_S
        for stream in self.streams:
            while stream.newest < stream.next - 1:
                assert time.monotonic() < end, f"no answer to {stream.name}'s last bin"
                stream.take(0.2)


MISHAPS = ("blip", "pause", "swap", "stop", "feeder", "kill")


@pytest.fixture
def soak(tmp_path: Path) -> Any:
    one = Soak(tmp_path)
    yield one
    one.close()


def test_after_all_mishaps_every_bin_has_one_last_answer_that_an_offline_run_gives(
    soak: Soak,
) -> None:
    began = time.monotonic()
    for k in range(ROUNDS):
        soak.feed(int(soak.rng.integers(10, 300 if FULL else 40)))
        soak.happen(MISHAPS[k] if k < len(MISHAPS) else str(soak.rng.choice(MISHAPS)))
    soak.settle()
    for stream in soak.streams:
        stream.leave()
    # the sessions end with the service
    assert soak.service.stop() == 0
    log, journal = (soak.folder / "log").read_text(), soak.folder / "journal"
    assert "Traceback" not in log
    verdict = verify(journal, soak.models)
    assert (verdict.runs, verdict.skipped) == (len(soak.streams), 0), verdict
    assert verdict.identical == verdict.answers, verdict
    results = once(journal)
    for stream in soak.streams:
        given = results[stream.name]
        last = {index: given[index, revision] for index, revision in sorted(given)}
        # every index has an answer, and whoever was told saw what is written
        assert sorted(last) == list(range(max(last) + 1))
        assert max(last) >= stream.next - 1  # of the clocked one some that never came
        for key, values in stream.answers.items():
            np.testing.assert_array_equal(numbers(given[key]), values)
        assert not [what for what in stream.notices if what.startswith(("reset", "lost"))]
        if stream.options.get("model") == "steady":
            against_offline(soak.models[1], stream, last)
    revised = sum(revision > 0 for given in results.values() for _, revision in given)
    refused: Counter[str] = sum((s.refused for s in soak.streams), Counter())
    print(
        f"\n{time.monotonic() - began:.0f} s, seed {SEED}: {dict(soak.happened)}; "
        f"{sum(s.next for s in soak.streams)} bins, {verdict.answers} answers ({revised} revised), "
        f"refused {dict(refused)}; {len(segments(journal))} segments"
    )


def once(journal: Path) -> dict[str, dict[tuple[int, int], messages.Result]]:
    """The answers of each session by index and revision; none was given twice."""
    names: dict[int, str] = {}
    frames: dict[tuple[int, int, int], bytes] = {}
    given: defaultdict[str, dict[tuple[int, int], messages.Result]] = defaultdict(dict)
    for path in segments(journal):
        for record in records(path):
            if isinstance(record, RunOpened):
                names[record.run] = record.request.session
            if isinstance(record, Answered):
                key = (record.run, record.index, record.revision)
                # a segment repeats the newest of those before it
                assert frames.setdefault(key, record.frame) == record.frame
    for (run, index, revision), frame in frames.items():
        result = messages.decode_published(frame)
        assert isinstance(result, messages.Result)
        given[names[run]][index, revision] = result
    return given


def against_offline(model: Path, stream: Stream, last: dict[int, messages.Result]) -> None:
    """The last answer of every bin is that of a run in order without the bins that are missing."""
    masks = np.array(stream.masks)
    masks[[index for index, result in last.items() if result.status == "missing"]] = False
    for index, expected in enumerate(offline(model, np.array(stream.counts), masks)):
        np.testing.assert_array_equal(numbers(last[index]), expected)
