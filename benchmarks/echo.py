"""The cost of the sockets alone: a server that answers each bin at once, without any work.

It uses the same sockets as the service (DEALER to ROUTER, XPUB to SUB), and messages of the same
sizes.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import msgspec
import numpy as np
import zmq

from ilqr_vae.protocol import messages
from ilqr_vae.protocol.clock import this_clock


def _zeros(size: int) -> messages.Array:
    return messages.pack(np.zeros(size), "<f8")


def _blank(latents: int, units: int) -> messages.Result:
    return messages.Result(
        session="", epoch=0, index=0, revision=0, model="0" * 12, status="ok",
        solver="iteration_limit", iterations=2, bits=0.0, spikes=0, source_ns=0, received_ns=0,
        solve_start_ns=0, solve_end_ns=0, published_ns=0, latent=_zeros(latents),
        latent_std=_zeros(latents), rates=_zeros(units), kinematics=_zeros(2),
        kinematics_std=_zeros(2),
    )  # fmt: skip


def _reply(message: messages.Upstream, units: int, bin_width: float, results: str) -> Any:
    """Return the reply of the service to a request."""
    match message:
        case messages.Describe():
            names = [f"unit{i}" for i in range(units)]
            return messages.Described(
                protocol=messages.PROTOCOL, model="echo", ready=True, device="", results=results,
                manifest={"model_id": "echo", "bin_width": bin_width, "unit_names": names},
            )  # fmt: skip
        case messages.Probe(client_ns=client_ns):
            now = time.monotonic_ns()
            return messages.Probed(client_ns=client_ns, service_ns=now, clock=this_clock())
        case messages.Open(session=session):
            return messages.Opened(
                session=session, epoch=0, model="echo", latents=0, kinematic_names=(),
                kinematic_units=(), horizon=1, iterations=0, credits=1,
            )  # fmt: skip
        case messages.Close(session=session):
            return messages.Closed(session=session, epoch=0, bins=0)
        case _:
            return None


def serve(latents: int, units: int, bin_width: float) -> None:
    """Print the addresses as one JSON line and echo until killed."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router, pub = context.socket(zmq.ROUTER), context.socket(zmq.XPUB)
    ports = [s.bind_to_random_port("tcp://127.0.0.1") for s in (router, pub)]
    ingest, results = (f"tcp://127.0.0.1:{port}" for port in ports)
    print(json.dumps({"ingest": ingest, "results": results}), flush=True)
    poller = zmq.Poller()
    poller.register(router, zmq.POLLIN)
    poller.register(pub, zmq.POLLIN)
    blank = _blank(latents, units)

    def notify(name: str, what: str) -> None:
        notice = messages.Notice(session=name, epoch=0, what=what)
        pub.send_multipart([messages.topic(name), messages.encode(notice)])

    while True:
        ready = dict(poller.poll())
        if pub in ready:
            asked = pub.recv()
            if asked[:1] == b"\x01":
                notify(asked[1:].rstrip(b"\x00").decode(), "subscribed")
        if router in ready:
            owner, frame = router.recv_multipart()
            message = messages.decode_upstream(frame)
            if isinstance(message, messages.Bin):
                now = time.monotonic_ns()
                answer = msgspec.structs.replace(
                    blank, session=message.session, index=message.index, received_ns=now,
                    solve_start_ns=now, solve_end_ns=now, published_ns=now,
                )  # fmt: skip
                pub.send_multipart([messages.topic(message.session), messages.encode(answer)])
            elif (reply := _reply(message, units, bin_width, results)) is not None:
                router.send_multipart([owner, messages.encode(reply)])
                if isinstance(message, messages.Close):
                    notify(message.session, "closed")


def main() -> None:
    """``python -m benchmarks.echo LATENTS UNITS BIN_WIDTH``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.echo", description=__doc__)
    parser.add_argument("latents", type=int)
    parser.add_argument("units", type=int)
    parser.add_argument("bin_width", type=float)
    given = parser.parse_args()
    serve(given.latents, given.units, given.bin_width)


if __name__ == "__main__":
    main()
