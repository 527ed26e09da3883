"""Keys, roles, limits: who is let in, and what they may do."""

from __future__ import annotations

import ast
import codecs
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from zmq.utils import z85

from feeder import UNITS, Feeder, bin_, open_, spikes
from ilqr_clients.sdk import ServiceClient
from ilqr_service.server import Service
from ilqr_service.settings import loopback_endpoint
from ilqr_service.transport.security import Gate, RateLimit
from ilqr_vae.cli import main
from ilqr_vae.errors import ConfigError, ProtocolError, ServiceError
from ilqr_vae.protocol import messages
from ilqr_vae.protocol.keys import add_client, make_server_key, read_authorized, read_client_key
from rig import BIN_S, make_model, serving

pytestmark = pytest.mark.chaos

SECOND = 1_000_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys")
    for name, roles in (
        ("rig", ("feed", "read")),
        ("reader", ("read",)),
        ("operator", ("control",)),
        ("gone", ("feed", "read")),
        ("mallory", ("feed", "read")),
    ):
        add_client(path, name, roles)
    return path


@pytest.fixture(scope="module")
def service(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    model = make_model(tmp_path_factory.mktemp("model") / "m.safetensors", n_units=7, names=UNITS)
    with serving(model, keys=str(folder), control_rate=1000.0) as running:
        yield running
    assert running.failure is None


def client(service: Service, folder: Path, name: str) -> ServiceClient:
    key = read_client_key(folder / f"{name}.key")
    return ServiceClient(service.ingest, timeout=5.0, key=key)


def test_keys_are_private_and_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in folder.glob("*.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert main(["keys", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "reader  read  " in out
    assert read_client_key(folder / "rig.key").secret not in out
    assert read_client_key(folder / "rig.key").server == make_server_key(folder).public
    for arguments in (["rig"], ["a b"], ["new", "--role", "king"], ["nobody", "--revoke"]):
        assert main(["keys", str(folder), *arguments]) == 2
        assert capsys.readouterr().err.startswith("error: ")
    assert main(["keys", str(folder / "more"), "rig", "--role", "feed"]) == 0
    assert read_authorized(folder / "more").client[0].roles == ("feed",)


def test_who_has_a_key_feeds_and_reads(service: Service, folder: Path) -> None:
    with (
        client(service, folder, "rig") as rig,
        rig.open("s", units=UNITS, bin_width=BIN_S, deadline=60) as session,
    ):
        session.send(0, spikes(1)[0])
        (answer,) = session.receive(20.0)
        assert (answer.index, answer.status) == (0, "ok")


def test_a_stranger_gets_no_connection_and_is_counted(
    service: Service, folder: Path, tmp_path: Path
) -> None:
    make_server_key(tmp_path)
    add_client(tmp_path, "stranger", ("feed", "read", "control"))
    own = read_client_key(tmp_path / "stranger.key")
    public = read_client_key(folder / "rig.key").server
    forged = type(own)(name="rig", public=own.public, secret=own.secret, server=public)
    with (
        ServiceClient(service.ingest, timeout=1.0, key=forged) as stranger,
        pytest.raises(ServiceError, match="expected an answer"),
    ):
        stranger.describe()
    with Feeder(service.ingest, service.results) as bare:  # no key at all
        bare.send(messages.Describe())
        assert not bare.dealer.poll(500)
    with client(service, folder, "rig") as rig:
        rig.describe()
        for _ in range(200):
            if service.telemetry.counts().get("refused:key", 0):
                break
            rig.clock(10)
    assert service.telemetry.counts()["refused:key"] >= 1


def test_roles_are_held_to(service: Service, folder: Path) -> None:
    before = service.telemetry.counts().get("refused:role", 0)
    with client(service, folder, "reader") as reader:
        assert reader.describe().ready
        with pytest.raises(ServiceError, match=r"role.*expected feed, got reader"):
            reader.open("s", units=UNITS, bin_width=BIN_S)
        with pytest.raises(ServiceError, match="role"):
            reader.load("m.safetensors")
    with client(service, folder, "rig") as rig, pytest.raises(ServiceError, match="role"):
        rig.roll_back()
    with client(service, folder, "operator") as operator:
        assert operator.models()[0].role == "serving"
        with pytest.raises(ServiceError, match="slot"):
            operator.roll_back()
    assert service.telemetry.counts()["refused:role"] == before + 3


def test_whoever_is_revoked_may_nothing_from_then_on(service: Service, folder: Path) -> None:
    with (
        client(service, folder, "gone") as gone,
        gone.open("leaving", units=UNITS, bin_width=BIN_S, deadline=60) as session,
    ):
        session.send(0, spikes(1)[0])
        assert len(session.receive(20.0)) == 1
        assert main(["keys", str(folder), "gone", "--revoke"]) == 0
        for index in range(1, 400):
            session.send(index, spikes(1)[0])
            session.receive(0.05)
            if session.refused:
                break
        assert session.refused[0].field == "role"
        with pytest.raises(ServiceError, match="role"):  # nor is anything answered
            gone.describe()


def test_a_session_is_its_users_in_every_way_in(service: Service, folder: Path) -> None:
    key = {name: read_client_key(folder / f"{name}.key") for name in ("rig", "mallory")}
    addresses = (service.ingest, service.results)
    row = spikes(1)[0]
    with Feeder(*addresses, key=key["rig"], identity=b"rig") as rig:
        rig.ask(open_("mine"), messages.Opened)
        with Feeder(*addresses, key=key["mallory"], identity=b"rig") as mallory:
            for message in (
                bin_("mine", 0, row),
                open_("mine", epoch=1),
                open_("mine", epoch=2**32),
                open_("mine", resume=True),
                messages.Close(session="mine"),
            ):
                assert mallory.ask(message, messages.Refused).field == "session"
        rig.subscribe("mine")
        rig.send(bin_("mine", 0, row))
        assert rig.results(1)[0].status == "ok"
        # epochs are not used up
        assert rig.ask(open_("mine", epoch=2**53), messages.Refused).field == "epoch"
        rig.ask(open_("mine", epoch=2**32), messages.Opened)
        assert rig.ask(open_("other", epoch=2**52 + 1), messages.Refused).field == "epoch"
        rig.ask(messages.Close(session="mine", epoch=2**32), messages.Closed)


@pytest.mark.parametrize(
    "text",
    [
        "{old}[[client]]\nname = 'new'\npublic = 'abc'\nroles = ['read']\n",
        "{old}[[client]]\nname = 'new'\npublic = '" + "~" * 40 + "'\nroles = ['read']\n",
        "{old}[[client]]\nname = 'new'\npublic = '" + "#" * 40 + "'\nroles = ['read']\n",
        "{old}[[client]]\nname = 'a b'\npublic = '" + "0" * 40 + "'\nroles = ['read']\n",
        "{old}{old}",
        "[[client\n",
        "[[client]]\nname = 'ri",
        "\0",
        "x = " + "[" * 10_000,
        "[x" + ".x" * 1000 + "]",
        "[x" + ".x" * 20_000 + "]",
        "x = " + "1" * 10_000,
        "#" * (2 << 20),
        Path.mkdir,
        os.mkfifo,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to(path.name),
    ],
)
def test_an_allow_list_that_cannot_be_read_leaves_the_old_one_and_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str | Callable[[Path], object]
) -> None:
    add_client(tmp_path, "rig", ("feed",))
    path, old = tmp_path / "authorized.toml", (tmp_path / "authorized.toml").read_text()
    public = z85.decode(read_client_key(tmp_path / "rig.key").public.encode())
    gate = Gate(tmp_path)
    if isinstance(text, str):
        path.write_text(text.replace("{old}", old))
    else:
        path.unlink()
        text(path)
    for _ in range(10):
        assert not gate.refresh()
    assert gate.user(public) == "rig"
    assert [r.levelname for r in caplog.records] == ["ERROR"]
    with pytest.raises(ConfigError, match="keys"):
        Gate(tmp_path)
    path.rmdir() if path.is_dir() else path.unlink()
    path.write_text("")  # all revoked, once it is sure that nobody is writing it
    assert not gate.refresh()
    assert gate.refresh()
    assert gate.user(public) == ""
    path.write_text("[[client\n")  # and a typo then does not end the service either
    for _ in range(3):
        assert not gate.refresh()
    assert gate.user(public) == ""


def test_an_allow_list_from_a_windows_editor_is_read(tmp_path: Path) -> None:
    add_client(tmp_path, "rig", ("feed",))
    path, before = tmp_path / "authorized.toml", read_authorized(tmp_path)
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_authorized(tmp_path) == before


def test_beyond_loopback_only_with_keys(folder: Path, tmp_path: Path) -> None:
    for address in ("tcp://0.0.0.0:5555", "tcp://*:*", "tcp://10.0.0.3:5555"):
        with pytest.raises(ServiceError, match="loopback"):
            loopback_endpoint("ingest", address)
        assert loopback_endpoint("ingest", address, secured=True).startswith("tcp://")
    model = make_model(tmp_path / "m.safetensors", n_units=7, names=UNITS)
    with serving(model, keys=str(folder), ingest="tcp://0.0.0.0:*", keep_warm_ms=0) as running:
        port = running.ingest.rpartition(":")[2]
        key = read_client_key(folder / "rig.key")
        with ServiceClient(f"tcp://127.0.0.1:{port}", timeout=5.0, key=key) as rig:
            assert rig.describe().model == running.model
    with pytest.raises(ConfigError, match="keys"), serving(model, keys=str(tmp_path)):
        pass


def test_nothing_of_ours_can_execute_what_it_reads() -> None:
    """No pickle, nor anything that rests on it; what torch saved is read as plain tensors."""
    forbidden = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"}
    forbidden |= {"marshal", "msgpack_numpy", "yaml"}
    root = Path(__file__).parent.parent
    found: list[str] = []
    for folder in ("src", "training", "service", "clients"):
        for path in (root / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names: list[str] = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                found += [f"{path}: {n}" for n in names if n.partition(".")[0] in forbidden]
                if isinstance(node, ast.Call):
                    called = ast.unparse(node.func)
                    keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                    if called == "torch.load" and keywords.get("weights_only") != "True":
                        found.append(f"{path}: {ast.unparse(node)}")
                    if called in ("eval", "exec") or keywords.get("allow_pickle") == "True":
                        found.append(f"{path}: {ast.unparse(node)}")
    assert found == []


def test_control_is_limited_by_sender() -> None:
    limit = RateLimit(10.0)
    for _ in range(20):
        limit.check(b"a", 0)
    with pytest.raises(ProtocolError, match="rate"):
        limit.check(b"a", 0)
    limit.check(b"b", 0)
    limit.check(b"a", SECOND // 10)
    with pytest.raises(ProtocolError, match="rate"):
        limit.check(b"a", SECOND // 10)


def test_answers_that_take_long_count_for_many() -> None:
    limit = RateLimit(10.0)
    limit.check(b"a", 0)
    limit.charge(b"a", SECOND // 2)  # a tenth of the time: so much in five seconds
    for later in (1, 2, 3):
        with pytest.raises(ProtocolError, match="rate"):
            limit.check(b"a", later * SECOND)
    limit.check(b"b", SECOND)
    limit.check(b"a", 4 * SECOND)


def test_too_many_requests_and_too_large_ones_are_refused_and_counted(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m.safetensors", n_units=7, names=UNITS)
    with (
        serving(model, control_rate=5.0, max_message_bytes=2048, keep_warm_ms=0) as service,
        Feeder(service.ingest, service.results) as feeder,
    ):
        feeder.subscribe("s")
        feeder.ask(open_("s"), messages.Opened)
        feeder.send(*(messages.Describe() for _ in range(30)))
        replies = [feeder.reply() for _ in range(30)]
        assert sum(isinstance(r, messages.Described) for r in replies) in range(10, 13)
        assert {r.field for r in replies if isinstance(r, messages.Refused)} == {"rate"}
        assert feeder.ask(b"x" * 4000, messages.Refused).field == "size"
        feeder.send(bin_("s", 0, spikes(1)[0]))  # bins are not requests
        assert feeder.results(1)[0].status == "ok"
        assert service.telemetry.counts()["refused:size"] == 1
