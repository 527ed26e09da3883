"""What the sockets alone take: a server that answers each bin at once, with no work done.

The paths are the service's (DEALER to ROUTER, XPUB to SUB), and the messages have the sizes of its
bins and answers.
"""

from __future__ import annotations

import argparse
import json
import time

import msgspec
import numpy as np
import zmq

from ilqr_vae.protocol import messages


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


def serve(latents: int, units: int) -> None:
    """Print the addresses as one JSON line and echo until killed."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router, pub = context.socket(zmq.ROUTER), context.socket(zmq.XPUB)
    ports = [s.bind_to_random_port("tcp://127.0.0.1") for s in (router, pub)]
    names = ("ingest", "results")
    addresses = {name: f"tcp://127.0.0.1:{port}" for name, port in zip(names, ports, strict=True)}
    print(json.dumps(addresses), flush=True)
    poller = zmq.Poller()
    poller.register(router, zmq.POLLIN)
    poller.register(pub, zmq.POLLIN)
    blank = _blank(latents, units)
    while True:
        ready = dict(poller.poll())
        if pub in ready:
            asked = pub.recv()
            if asked[:1] == b"\x01":
                name = asked[1:].rstrip(b"\x00").decode()
                notice = messages.Notice(session=name, epoch=0, what="subscribed")
                pub.send_multipart([asked[1:], messages.encode(notice)])
        if router in ready:
            owner, frame = router.recv_multipart()
            message = messages.decode_upstream(frame)
            if isinstance(message, messages.Open):
                opened = messages.Opened(
                    session=message.session, epoch=0, model="echo", latents=latents,
                    kinematic_names=(), kinematic_units=(), horizon=1, iterations=0, credits=1,
                )  # fmt: skip
                router.send_multipart([owner, messages.encode(opened)])
            elif isinstance(message, messages.Bin):
                now = time.monotonic_ns()
                answer = msgspec.structs.replace(
                    blank, session=message.session, index=message.index, received_ns=now,
                    solve_start_ns=now, solve_end_ns=now, published_ns=now,
                )  # fmt: skip
                pub.send_multipart([messages.topic(message.session), messages.encode(answer)])


def main() -> None:
    """``python -m benchmarks.echo LATENTS UNITS``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.echo", description=__doc__)
    parser.add_argument("latents", type=int)
    parser.add_argument("units", type=int)
    given = parser.parse_args()
    serve(given.latents, given.units)


if __name__ == "__main__":
    main()
