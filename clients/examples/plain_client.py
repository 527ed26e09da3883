"""Stream counts through a running service with only pyzmq and msgpack.

Usage: python plain_client.py tcp://127.0.0.1:5555 counts.csv   (a line per bin, a column per unit)
"""

import array
import sys
import time
from pathlib import Path

import msgpack
import zmq

WAIT_MS = 5000


def receive(socket: zmq.Socket[bytes], kind: str, what: str) -> dict[str, object]:
    """Return the next message of a kind: its last frame; earlier frames are the topic."""
    while socket.poll(WAIT_MS):
        message = msgpack.unpackb(socket.recv_multipart()[-1])
        if message["type"] == "refused":
            raise SystemExit("{field}: expected {expected}, got {got}".format(**message))
        if message["type"] == kind:
            return message
    raise SystemExit(f"no {what} within {WAIT_MS} ms: is the service running?")


endpoint, file = sys.argv[1:]
context = zmq.Context()
dealer, results = context.socket(zmq.DEALER), context.socket(zmq.SUB)
dealer.connect(endpoint)
dealer.send(msgpack.packb({"type": "describe"}))
service = receive(dealer, "described", "description")
model = service["manifest"]
results.connect(service["results"])
results.subscribe(b"plain\0")
receive(results, "notice", "subscription")  # from here on no result is missed
session = {"session": "plain", "epoch": time.time_ns() // 10**9}
width = {"bin_width_ns": round(model["bin_width"] * 1e9), "deadline_ns": 0}
request = {"protocol": service["protocol"], "units": model["unit_names"], **session, **width}
dealer.send(msgpack.packb({"type": "open", **request}))
receive(dealer, "opened", "answer to open")
for index, line in enumerate(Path(file).read_text().splitlines()):
    counts = array.array("H", map(int, line.split(",")))
    packed = {"dtype": "<u2", "shape": [len(counts)], "data": counts.tobytes()}
    bin_ = {"index": index, "source_ns": time.monotonic_ns(), "counts": packed}
    dealer.send(msgpack.packb({"type": "bin", **session, **bin_}))
    result = receive(results, "result", f"answer to bin {index}")
    print(index, result["status"], *array.array("d", result["kinematics"]["data"]))
dealer.send(msgpack.packb({"type": "close", **session}))
receive(dealer, "closed", "confirmation")
