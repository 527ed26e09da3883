"""One example of every message, and the page and the file of test vectors that are checked by them.

``python tests/protocol_examples.py`` writes docs/protocol-vectors.json anew, after a message has
changed and its page with it.
"""

from __future__ import annotations

import json
import types
import typing
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import numpy as np
from msgspec import UNSET, UnsetType
from msgspec.structs import FieldInfo, fields

from ilqr_vae.protocol import messages as m

DOCS = Path(__file__).parents[1] / "docs"
VECTORS = DOCS / "protocol-vectors.json"
PAGE = DOCS / "protocol.md"

_COUNTS = m.pack(np.array([0, 3, 1]), "<u2")
_TWO = m.pack(np.array([0.5, -1.0]), "<f8")
_CLOCK = m.Offset(-1500, 200)

UPSTREAM: list[m.Message] = [
    m.Describe(),
    m.Open(
        protocol=2,
        session="rat-7",
        units=("a", "b", "c"),
        bin_width_ns=50_000_000,
        epoch=1,
        deadline_ns=0,
        token="t",
    ),
    m.Open(
        protocol=2,
        session="rat-7",
        units=("a", "b", "c"),
        bin_width_ns=50_000_000,
        deadline_ns=20_000_000,
        anytime=True,
        clocked=True,
        grace_ns=10_000_000,
        watch_units=True,
        resume=True,
        answered=41,
        model="main",
        begin=False,
        origin_ns=7_000_000,
        abstain=0.8,
        lag=2,
    ),
    m.Bin(session="rat-7", index=0, source_ns=12, counts=_COUNTS),
    m.Bin(
        session="rat-7",
        epoch=1,
        index=70_000,
        source_ns=2**40,
        counts=_COUNTS,
        mask=m.pack(np.array([1, 0, 1, 1, 1]), "u1"),
        clock=_CLOCK,
        token="t",
        features=_TWO,
    ),
    m.Spikes(
        session="rat-7",
        index=5,
        source_ns=70_000_000,
        times_ns=m.pack(np.array([57_000_001, 60_000_000]), "<i8"),
        units=m.pack(np.array([2, 0]), "<u2"),
        until_ns=65_000_000,
        clock=_CLOCK,
    ),
    m.Event(
        session="rat-7",
        name="trial_start",
        time_ns=55_000_000,
        payload={"target": [0.1, -0.05], "side": "left"},
        source="task",
        index=3,
        clock=_CLOCK,
    ),
    m.Close(session="rat-7", epoch=1),
    m.Sessions(),
    m.Probe(client_ns=99),
    m.Models(),
    m.Load(path="newer.safetensors", shadow=True),
    m.Swap(),
    m.Rollback(slot="main"),
]

DOWNSTREAM: list[m.Message] = [
    m.Described(
        protocol=2,
        model="8f3a",
        ready=True,
        device="cpu",
        results="tcp://127.0.0.1:5556",
        manifest={"model_id": "8f3a", "bin_width": 0.05, "unit_names": ["a", "b", "c"]},
    ),
    m.Opened(
        session="rat-7",
        epoch=1,
        model="8f3a",
        latents=2,
        kinematic_names=("vx", "vy"),
        kinematic_units=("m/s", "m/s"),
        horizon=20,
        iterations=2,
        credits=64,
    ),
    m.Opened(
        session="rat-7",
        epoch=1,
        model="8f3a",
        latents=2,
        kinematic_names=(),
        kinematic_units=(),
        horizon=20,
        iterations=2,
        credits=60,
        next_index=42,
        resumed=True,
        next_batch=105,
        ignored=("novelty",),
        features=("sbp0", "sbp1"),
    ),
    m.Moved(
        session="rat-7",
        epoch=1,
        ingest="tcp://10.0.0.7:5555",
        results="tcp://10.0.0.7:5556",
        down_ns=1_800_000_000,
    ),
    m.Credit(session="rat-7", epoch=1, index=7, credits=8),
    m.Noted(session="rat-7", epoch=1, source="task", index=3, received_ns=101, bin=8),
    m.Refused(field="index", expected="8 or above", got="7", session="rat-7", index=7),
    m.Refused(field="message", expected="a message to the service", got="a number"),
    m.Closed(session="rat-7", epoch=1, bins=8, reason="closed"),
    m.SessionList(
        sessions=(
            m.SessionInfo(
                session="rat-7",
                epoch=1,
                bins=8,
                next_index=8,
                deadline_ns=50_000_000,
                statuses={"ok": 7, "missing": 1},
                solve_p50_ns=900_000,
                solve_p99_ns=1_500_000,
                bits_per_spike=0.21,
                idle_ns=4,
                model="8f3a",
                flagged=("b:dead",),
                calibration=0.93,
            ),
        )
    ),
    m.Probed(client_ns=99, service_ns=101, clock="6c5f"),
    m.ModelList(models=(m.ModelInfo(slot="main", model="8f3a", role="serving"),)),
]

PUBLISHED: list[m.Message] = [
    m.Detail(session="rat-7", epoch=1, index=3),
    m.Detail(
        session="rat-7",
        epoch=1,
        index=4,
        revision=1,
        counts=_COUNTS,
        mask=m.pack(np.array([1, 0, 1, 1, 1]), "u1"),
        features=_TWO,
        inputs=_TWO,
        input_delay=5,
        members=m.pack(np.array([[0.5, -1.0], [2.0, 0.25]]), "<f8"),
    ),
    m.Notice(session="rat-7", epoch=1, what="opened"),
    m.Result(
        session="rat-7",
        epoch=1,
        index=7,
        revision=1,
        model="8f3a",
        status="ok",
        solver="converged",
        iterations=2,
        source_ns=12,
        received_ns=101,
        solve_start_ns=102,
        solve_end_ns=103,
        published_ns=104,
        latent=_TWO,
        latent_std=_TWO,
        rates=m.pack(np.array([0.1, 2.0, 0.7]), "<f8"),
        kinematics=_TWO,
        kinematics_std=_TWO,
        bits=1.25,
        spikes=4,
        clock=_CLOCK,
        ignored=("b",),
        classes=m.pack(np.array([0.9, 0.1]), "<f8"),
        class_name="left",
    ),
    m.Event(
        session="rat-7",
        name="reward",
        time_ns=55_000_000,
        payload={"ml": 0.1},
        source="task",
        index=4,
        received_ns=56_000_000,
        bin=8,
        epoch=1,
    ),
]

PARTS: list[type[msgspec.Struct]] = [m.Array, m.Offset, m.SessionInfo, m.ModelInfo]


def kinds() -> list[type[msgspec.Struct]]:
    """Every message and part, each once."""
    return list(dict.fromkeys([type(e) for e in (*UPSTREAM, *DOWNSTREAM, *PUBLISHED)] + PARTS))


def title(kind: type[msgspec.Struct]) -> str:
    """How the page calls it."""
    return str(kind.__struct_config__.tag or kind.__name__.lower())


def _type(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin in (typing.Union, types.UnionType):
        plain = [a for a in arguments if a is not UnsetType]
        return " or ".join("nil" if a is type(None) else _type(a) for a in plain)
    if origin is typing.Literal:
        return "one of " + ", ".join(f"`{a}`" for a in arguments)
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if origin is dict or hint is dict:
        return "map"
    names = {int: "integer", str: "text", bool: "boolean", float: "number", bytes: "bytes"}
    return names.get(hint) or f"[{title(hint)}](#{title(hint)})"


def _default(field: FieldInfo) -> str:
    if field.default_factory is not msgspec.NODEFAULT:
        return "`{}`"
    if field.default is msgspec.NODEFAULT:
        return "required"
    if field.default is UNSET:
        return "left out"
    return "nil" if field.default is None else f"`{json.dumps(field.default)}`"


def rows(kind: type[msgspec.Struct]) -> dict[str, tuple[str, str]]:
    """Type and default of each field, as the page has to state them."""
    return {f.encode_name: (_type(f.type), _default(f)) for f in fields(kind)}


def decoded(value: Any) -> Any:
    """What any MessagePack library makes of a frame, as JSON; bytes as {"hex": ...}."""
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    if isinstance(value, dict):
        return {key: decoded(v) for key, v in value.items()}
    return [decoded(v) for v in value] if isinstance(value, list) else value


def vectors() -> list[dict[str, Any]]:
    """The test vectors, from the examples."""
    planes = {"client": UPSTREAM, "service": DOWNSTREAM, "published": PUBLISHED}
    return [
        {
            "type": title(type(one)),
            "sent": plane,
            "hex": m.encode(one).hex(),
            "json": decoded(msgpack.unpackb(m.encode(one))),
        }
        for plane, examples in planes.items()
        for one in examples
    ]


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(vector) for vector in vectors())
    VECTORS.write_text(f"[\n{lines}\n]\n")
